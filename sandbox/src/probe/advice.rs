//! From facts to causes and fixes: no system call is made here.

use std::path::Path;

use nix::errno::Errno;

use super::host::Host;
use super::outcome::{Found, Outcome, Tried, Trouble, Why};
use super::steps::Step;

/// Why a step was refused, and what to do about it.
#[derive(Debug, PartialEq, Eq)]
struct Advice {
    /// The reason behind the refusal, as far as it shows; may be empty.
    reason: String,
    /// What to do.
    fix: String,
}

impl Advice {
    fn new(reason: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { reason: reason.into(), fix: fix.into() }
    }

    fn fix(fix: impl Into<String>) -> Self {
        Self::new("", fix)
    }
}

/// What is told of a step.
pub fn judge(step: Step, tried: Tried, host: &Host) -> Outcome {
    match tried {
        Ok(Found { detail, shortfall: None }) => Outcome::Works { detail },
        Ok(Found { detail, shortfall: Some(trouble) }) => {
            let (cause, fix) = told(step, &trouble, host);
            Outcome::Degraded { detail, errno: trouble.as_errno(), cause, fix }
        }
        Err(trouble) => {
            let (cause, fix) = told(step, &trouble, host);
            Outcome::Missing { errno: trouble.as_errno(), cause, fix }
        }
    }
}

fn told(step: Step, trouble: &Trouble, host: &Host) -> (String, String) {
    let Advice { reason, fix } = advise(step, trouble, host);
    let cause = match reason.as_str() {
        "" => trouble.to_string(),
        reason => format!("{trouble}: {reason}"),
    };
    (cause, fix)
}

fn advise(step: Step, trouble: &Trouble, host: &Host) -> Advice {
    let specific = match step {
        Step::UserNamespace | Step::Enter | Step::Clone | Step::NestedNamespaces => {
            user_namespace(trouble, host)
        }
        Step::MountNamespace => other_namespace("mnt", trouble, host),
        Step::PidNamespace => other_namespace("pid", trouble, host),
        Step::NetworkNamespace => other_namespace("net", trouble, host),
        Step::IpcNamespace => other_namespace("ipc", trouble, host),
        Step::UtsNamespace => other_namespace("uts", trouble, host),
        Step::CgroupNamespace => other_namespace("cgroup", trouble, host),
        Step::SubIds => Some(sub_ids(host)),
        Step::IdHelpers => Some(Advice::fix(INSTALL_HELPERS)),
        Step::BuildIds => Some(build_ids(trouble, host)),
        Step::Groups => Some(Advice::new(
            "with one id the kernel lets nobody drop them",
            "give the user subordinate ids, or run as a user without these groups",
        )),
        Step::Proc => proc(trouble, host),
        Step::FuseDevice | Step::FuseMount => fuse(trouble),
        Step::Pasta => Some(pasta(trouble)),
        Step::Landlock => landlock(trouble),
        Step::Cgroup | Step::CgroupControllers => cgroup(trouble, host),
        Step::CgroupKill => Some(Advice::fix("cgroup.kill takes Linux 5.14")),
        Step::StateDirectory => Some(Advice::fix(
            "make it this user's own (chown), closed to others (chmod go-w) and empty at first, or choose another with --state-dir",
        )),
        Step::StateSpace => Some(Advice::fix("make room, or choose another disk with --state-dir")),
        Step::StateExecute if trouble.as_errno() == Some(Errno::EPERM) => Some(Advice::new(
            "its file system is mounted noexec",
            "mount it without noexec, or choose another directory with --state-dir",
        )),
        Step::StateOverlay => Some(Advice::fix(
            "choose a directory on ext4, xfs, btrfs or tmpfs with --state-dir; overlayfs, NFS and the like can't be an upper layer",
        )),
        Step::StateAttributes => {
            Some(Advice::fix("choose a directory on ext4, xfs, btrfs, or tmpfs (Linux 6.6) with --state-dir"))
        }
        Step::Kvm => Some(Advice::fix("for builds that ask for it: let this user open /dev/kvm (group kvm)")),
        Step::Devices | Step::Devpts => device(trouble),
        Step::WholeSandbox | Step::WholeBuild => Some(Advice::fix("see the steps above that do not work")),
        _ => None,
    };
    specific.unwrap_or_else(|| general(trouble, host))
}

/// Where nothing is known of the step itself.
fn general(trouble: &Trouble, host: &Host) -> Advice {
    filter(trouble, host).or_else(|| unmapped(trouble, host)).unwrap_or_else(|| match (trouble.as_errno(), &trouble.why) {
        (Some(Errno::ENOSYS), _) => Advice::new(
            format!("this kernel ({}) does not have it", host.kernel),
            "use Linux 5.12 or later; 6.6 or later is tested",
        ),
        (Some(Errno::EPERM | Errno::EACCES), _) => Advice::fix(
            "something outside of this program forbids it: a container engine, a service manager or a security module; \
             see its log and `dmesg`",
        ),
        (_, Why::TimedOut) => Advice::fix("see what the process waits for: /proc/PID/stack, `dmesg`"),
        _ => Advice::fix(""),
    })
}

/// A system call filter around this program.
fn filter(trouble: &Trouble, host: &Host) -> Option<Advice> {
    let by_filter = match &trouble.why {
        Why::Signal(signal) => *signal == libc::SIGSYS,
        Why::Errno(_) => matches!(trouble.as_errno(), Some(Errno::EPERM | Errno::ENOSYS | Errno::EACCES)),
        _ => false,
    };
    (by_filter && host.seccomp == 2).then(|| {
        Advice::new(
            "a system call filter is on this process (Seccomp: 2 in /proc/self/status)",
            match host.container.as_deref() {
                Some("docker" | "podman") => {
                    "run the container with --security-opt seccomp=unconfined, or with a profile that allows this call"
                }
                _ => {
                    "in a container: --security-opt seccomp=unconfined, or a profile that allows this call; in a service: \
                     no SystemCallFilter= and RestrictNamespaces= that forbid it"
                }
            },
        )
    })
}

/// A chroot, where the kernel gives no user namespaces.
fn unmapped(trouble: &Trouble, host: &Host) -> Option<Advice> {
    (trouble.as_errno() == Some(Errno::EPERM) && host.is_in_chroot()).then(|| {
        Advice::new(
            "this program runs in a chroot, where the kernel makes no user namespaces",
            "run it outside, or enter the directory with pivot_root (bwrap, unshare --root in a mount namespace of its own)",
        )
    })
}

/// The command that changes a setting, and what keeps it.
fn set_sysctl(name: &str, now: &str, value: &str) -> String {
    format!(
        "sysctl -w {name}={value} (it is {now}); to keep it: echo '{name} = {value}' > /etc/sysctl.d/60-cofferdam.conf"
    )
}

fn user_namespace(trouble: &Trouble, host: &Host) -> Option<Advice> {
    match trouble.as_errno()? {
        Errno::ENOSPC | Errno::EUSERS => Some(limit("user", host)),
        Errno::EINVAL | Errno::ENOSYS if host.seccomp != 2 => Some(Advice::new(
            "this kernel is built without user namespaces, or is older than Linux 5.3",
            "use a kernel with CONFIG_USER_NS",
        )),
        Errno::EPERM | Errno::EACCES => forbidden(host),
        _ => None,
    }
}

/// User namespaces that a setting forbids to this user.
fn forbidden(host: &Host) -> Option<Advice> {
    const CLONE: &str = "kernel.unprivileged_userns_clone";
    const APPARMOR: &str = "kernel.apparmor_restrict_unprivileged_userns";
    if host.sysctl(CLONE) == Some("0") && !host.is_admin {
        return Some(Advice::new(format!("{CLONE} is 0"), set_sysctl(CLONE, "0", "1")));
    }
    let unconfined = host.apparmor.as_deref().is_none_or(|profile| profile.starts_with("unconfined"));
    if host.sysctl(APPARMOR).is_some_and(|value| value != "0") && unconfined && !host.is_admin {
        let value = host.sysctl(APPARMOR).unwrap_or_default();
        return Some(Advice::new(
            format!("{APPARMOR} is {value}, and AppArmor has no profile for this program"),
            apparmor_profile(&host.program, value),
        ));
    }
    match host.apparmor.as_deref() {
        Some(profile) if !profile.starts_with("unconfined") && host.seccomp != 2 => Some(Advice::new(
            format!("this program runs under the AppArmor profile {profile}"),
            "let the profile allow `userns,` and `mount,` or run outside of it (container: --security-opt \
                 apparmor=unconfined); see `dmesg | grep apparmor`",
        )),
        _ => None,
    }
}

/// What to install where AppArmor gives namespaces to known programs alone.
fn apparmor_profile(program: &Path, value: &str) -> String {
    let program = program.display();
    format!(
        "install a profile, as root:\n\
         cat > /etc/apparmor.d/cofferdam <<'END'\n\
         abi <abi/4.0>,\n\
         include <tunables/global>\n\
         profile cofferdam {program} flags=(unconfined) {{\n\
         \x20 userns,\n\
         }}\n\
         END\n\
         apparmor_parser -r /etc/apparmor.d/cofferdam\n\
         or, for all programs: {}",
        set_sysctl("kernel.apparmor_restrict_unprivileged_userns", value, "0")
    )
}

fn other_namespace(kind: &str, trouble: &Trouble, host: &Host) -> Option<Advice> {
    match trouble.as_errno()? {
        Errno::ENOSPC | Errno::EUSERS => Some(limit(kind, host)),
        // The namespace is there, but without capabilities in it.
        Errno::EPERM | Errno::EACCES => forbidden(host),
        Errno::EINVAL => Some(Advice::new(
            "this kernel is built without them",
            format!("use a kernel with CONFIG_{}_NS", kind.to_uppercase()),
        )),
        _ => None,
    }
}

/// A limit of namespaces that is reached.
fn limit(kind: &str, host: &Host) -> Advice {
    const ENOUGH: &str = "15000";
    let name = format!("user.max_{kind}_namespaces");
    match host.sysctl(&name) {
        Some("0") => Advice::new(format!("{name} is 0"), set_sysctl(&name, "0", ENOUGH)),
        Some(value) => Advice::new(
            format!(
                "{name} is {value} here, and reached, or that of an outer user namespace is, or they are nested 32 deep"
            ),
            format!("raise it where it is too low: {}", set_sysctl(&name, value, ENOUGH)),
        ),
        None => Advice::new(
            format!("a limit is reached; {name} can't be read here"),
            format!("on the host: sysctl -w {name}={ENOUGH}"),
        ),
    }
}

const INSTALL_HELPERS: &str = "install newuidmap and newgidmap (Debian, Ubuntu: apt install uidmap; Fedora: dnf install shadow-utils; Arch: shadow)";

/// The first of a range of 65536 ids that no line of a file has.
fn free_start(lines: &str) -> u64 {
    const FIRST: u64 = 100_000;
    let end = |line: &str| {
        let mut fields = line.trim().split(':').skip(1).map(|field| field.parse::<u64>().ok());
        Some(fields.next()?? + fields.next()??)
    };
    lines.lines().filter_map(end).fold(FIRST, u64::max)
}

fn sub_ids(host: &Host) -> Advice {
    let start = free_start(&host.subuid).max(free_start(&host.subgid));
    let line = format!("{}:{start}:65536", host.user_name());
    Advice::fix(format!("add this line to /etc/subuid and to /etc/subgid, as root: {line}"))
}

fn build_ids(trouble: &Trouble, host: &Host) -> Advice {
    if host.is_admin {
        return Advice::new(
            "a container with a map of a few ids",
            "give the container 65536 ids or more (docker: userns-remap; podman: --userns=auto:size=65536)",
        );
    }
    let Why::Said(words) = &trouble.why else { return general(trouble, host) };
    if words.contains("could not map") {
        return match host.no_new_privs {
            true => Advice::new(
                "no_new_privs is set on this process, so set-id programs have no effect",
                "start it without (service: NoNewPrivileges=no; container: without --security-opt no-new-privileges)",
            ),
            false => Advice::fix(
                "newuidmap and newgidmap must belong to root and be set-uid (chmod u+s) or have file capabilities \
                 (setcap cap_setuid+ep, cap_setgid+ep), on a file system that is not mounted nosuid",
            ),
        };
    }
    Advice::fix("see the steps sub-ids and id-helpers")
}

fn proc(trouble: &Trouble, host: &Host) -> Option<Advice> {
    if trouble.as_errno() != Some(Errno::EPERM) {
        return None;
    }
    const ENGINES: &str = "docker: --security-opt systempaths=unconfined; podman: --security-opt unmask=ALL; \
                           Kubernetes: procMount: Unmasked; or a privileged container; in a service: no \
                           ProtectKernelTunables=, ProtectKernelLogs= or ProtectProc=";
    let masks = host.masks_of_proc();
    if !masks.is_empty() {
        let list: Vec<String> = masks.iter().map(|path| path.display().to_string()).collect();
        return Some(Advice::new(
            format!(
                "the kernel makes no fresh /proc where parts of the old one are covered: {}",
                list.join(", ")
            ),
            format!("uncover them: {ENGINES}"),
        ));
    }
    match host.proc_mount() {
        None => Some(Advice::new(
            "the kernel makes a fresh /proc only where one is mounted, and none is on /proc here",
            "mount -t proc proc /proc",
        )),
        Some(mount) if mount.root != "/" || mount.options.split(',').any(|option| option == "ro") => {
            Some(Advice::new(
                "/proc is mounted read-only or in part",
                format!("mount it whole and writable: {ENGINES}"),
            ))
        }
        Some(_) => None,
    }
}

fn fuse(trouble: &Trouble) -> Option<Advice> {
    let Some(errno) = trouble.as_errno() else {
        return Some(Advice::fix(
            "rm /dev/fuse; mknod -m 0666 /dev/fuse c 10 229; in a container: --device /dev/fuse",
        ));
    };
    match errno {
        Errno::ENOENT => Some(Advice::fix(
            "load the module (modprobe fuse); in a container, pass the device: --device /dev/fuse",
        )),
        Errno::EACCES => Some(Advice::new(
            "its mode does not let this user open it",
            "chmod 0666 /dev/fuse; to keep it: echo 'KERNEL==\"fuse\", MODE=\"0666\"' > /etc/udev/rules.d/60-fuse.rules",
        )),
        Errno::EPERM => Some(Advice::new(
            "a device filter of the container forbids it, or it lies on a file system that is mounted nodev",
            "pass the device: --device /dev/fuse",
        )),
        Errno::ENXIO | Errno::ENODEV => Some(Advice::new(
            "the kernel's part of FUSE is not there",
            "modprobe fuse, or use a kernel with CONFIG_FUSE_FS",
        )),
        _ => None,
    }
}

fn pasta(trouble: &Trouble) -> Advice {
    match trouble.as_errno() {
        None => Advice::fix("install pasta of 2023 or later (Debian, Fedora, Arch: passt)"),
        Some(Errno::EACCES) => Advice::fix("chmod 0666 /dev/net/tun, as udev does"),
        Some(_) => Advice::fix("modprobe tun; in a container, pass the device: --device /dev/net/tun"),
    }
}

fn landlock(trouble: &Trouble) -> Option<Advice> {
    match trouble.as_errno() {
        Some(Errno::ENOSYS) => Some(Advice::fix("use a kernel with CONFIG_SECURITY_LANDLOCK, 6.12 or later")),
        Some(Errno::EOPNOTSUPP) => Some(Advice::new(
            "the kernel has landlock, but it was not enabled at boot",
            "add landlock to the kernel's lsm= parameter",
        )),
        None => Some(Advice::fix("use Linux 6.12 or later")),
        _ => None,
    }
}

fn cgroup(trouble: &Trouble, host: &Host) -> Option<Advice> {
    const DELEGATE: &str = "for a service: Delegate=yes in its unit; at a terminal: systemd-run --user --scope -p \
                            Delegate=yes cofferdam ... (root: without --user); or name one with --cgroup";
    const VERSION_2: &str = "boot with systemd.unified_cgroup_hierarchy=1 or cgroup_no_v1=all";
    if host.cgroup_dir().is_none() {
        return Some(match &host.cgroup {
            None => Advice::new(
                "no cgroup (v2) is mounted",
                "boot with systemd.unified_cgroup_hierarchy=1 or, in a container, use a host that has cgroup v2",
            ),
            Some(own) => Advice::new(
                format!("the group {own} is not below what is mounted"),
                "give the container a cgroup namespace of its own (--cgroupns=private) and a writable /sys/fs/cgroup",
            ),
        });
    }
    match (trouble.as_errno(), &trouble.why) {
        (Some(Errno::EROFS), _) => Some(Advice::new(
            "the cgroup file system is mounted read-only",
            "in a container: --privileged, or mount /sys/fs/cgroup writable with --cgroupns=private",
        )),
        _ if uses_v1(host) => Some(Advice::new(
            "cgroup version 1 has the controllers on this machine",
            format!("{VERSION_2}; then {DELEGATE}"),
        )),
        _ => Some(Advice::fix(DELEGATE)),
    }
}

/// Whether controllers are taken by hierarchies of version 1.
fn uses_v1(host: &Host) -> bool {
    host.mounts.iter().any(|mount| mount.kind == "cgroup")
}

fn device(trouble: &Trouble) -> Option<Advice> {
    match trouble.as_errno()? {
        Errno::ENOENT => Some(Advice::fix(
            "the device has to be in /dev; see `ls -l /dev`, mount devtmpfs or devpts there",
        )),
        Errno::EACCES | Errno::EPERM => Some(Advice::fix(
            "/dev must not be mounted nodev, and a container's device filter must allow the device",
        )),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(sysctls: &[(&'static str, &str)]) -> Host {
        Host {
            uid: 1000,
            user: Some("me".into()),
            sysctls: sysctls.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
            program: "/opt/my/cofferdam".into(),
            ..Host::default()
        }
    }

    fn told_of(step: Step, errno: Errno, host: &Host) -> (String, String) {
        told(step, &Trouble::errno("do it", errno), host)
    }

    /// Settings, refusal, and what must be in the cause and in the fix.
    #[test]
    fn a_refused_user_namespace_is_traced_to_its_setting() {
        let clone = "kernel.unprivileged_userns_clone";
        let apparmor = "kernel.apparmor_restrict_unprivileged_userns";
        let max = "user.max_user_namespaces";
        let table = [
            (
                vec![(clone, "0"), (apparmor, "1")],
                Errno::EPERM,
                "userns_clone is 0",
                "sysctl -w kernel.unprivileged_userns_clone=1",
            ),
            (
                vec![(clone, "1"), (apparmor, "1")],
                Errno::EACCES,
                "no profile",
                "profile cofferdam /opt/my/cofferdam",
            ),
            (
                vec![(clone, "1"), (apparmor, "1")],
                Errno::EPERM,
                "userns is 1",
                "restrict_unprivileged_userns=0",
            ),
            (
                vec![(max, "0")],
                Errno::ENOSPC,
                "max_user_namespaces is 0",
                "sysctl -w user.max_user_namespaces=15000 (it is 0)",
            ),
            (vec![(max, "77")], Errno::ENOSPC, "is 77 here", "(it is 77)"),
            (vec![], Errno::EUSERS, "can't be read", "sysctl -w user.max_user_namespaces"),
            (vec![], Errno::EINVAL, "built without", "CONFIG_USER_NS"),
            (vec![(clone, "1"), (apparmor, "0")], Errno::EPERM, "not permitted", "a security module"),
        ];
        for (sysctls, errno, in_cause, in_fix) in table {
            let (cause, fix) = told_of(Step::UserNamespace, errno, &host(&sysctls));
            let cause = cause.to_lowercase();
            assert!(cause.contains(in_cause), "{sysctls:?} {errno}: {cause}");
            assert!(fix.contains(in_fix), "{sysctls:?} {errno}: {fix}");
        }
    }

    /// Settings for unprivileged users are not what stops root.
    #[test]
    fn root_is_not_sent_to_settings_that_do_not_concern_it() {
        let root = Host { is_admin: true, ..host(&[("kernel.unprivileged_userns_clone", "0")]) };
        assert!(!told_of(Step::UserNamespace, Errno::EPERM, &root).1.contains("sysctl"));
    }

    #[test]
    fn each_kind_of_namespace_has_its_own_limit() {
        let (cause, fix) =
            told_of(Step::NetworkNamespace, Errno::ENOSPC, &host(&[("user.max_net_namespaces", "0")]));
        assert!(
            cause.contains("user.max_net_namespaces is 0") && fix.contains("user.max_net_namespaces=15000")
        );
    }

    #[test]
    fn an_outer_filter_is_named_where_there_is_one() {
        let filtered = Host { seccomp: 2, ..host(&[]) };
        let killed = Trouble { act: "get to the end".into(), why: Why::Signal(libc::SIGSYS) };
        for (cause, _) in [
            told_of(Step::Clone, Errno::EPERM, &filtered),
            told(Step::Memfd, &killed, &filtered),
            told_of(Step::Memfd, Errno::ENOSYS, &filtered),
        ] {
            assert!(cause.contains("Seccomp: 2"), "{cause}");
        }
        assert!(!told_of(Step::Clone, Errno::EPERM, &host(&[])).0.contains("Seccomp"));
        assert!(!told_of(Step::Clone, Errno::ENOMEM, &filtered).0.contains("Seccomp"));
    }

    #[test]
    fn the_line_for_subordinate_ids_is_free_in_both_files() {
        let table = [
            ("", "", "me:100000:65536"),
            ("you:100000:65536\n", "", "me:165536:65536"),
            ("you:100000:65536\n", "you:300000:65536\nbroken\n:::\nx:y:z\n", "me:365536:65536"),
            ("you:5:10\n", "", "me:100000:65536"),
        ];
        for (subuid, subgid, line) in table {
            let host = Host { subuid: subuid.into(), subgid: subgid.into(), ..host(&[]) };
            let fix = sub_ids(&host).fix;
            assert!(fix.ends_with(line), "{subuid:?} {subgid:?}: {fix}");
        }
        let nameless = Host { user: None, ..host(&[]) };
        assert!(sub_ids(&nameless).fix.ends_with(" 1000:100000:65536"));
    }

    #[test]
    fn helpers_without_effect_are_traced_to_no_new_privs() {
        let trouble = Trouble::said(
            "give builds ids of their own",
            "/usr/bin/newuidmap could not map the subordinate ids",
        );
        let confined = Host { no_new_privs: true, ..host(&[]) };
        assert!(build_ids(&trouble, &confined).reason.contains("no_new_privs"));
        assert!(build_ids(&trouble, &host(&[])).fix.contains("chmod u+s"));
    }
}
