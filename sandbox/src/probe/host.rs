//! What is read of the host: not to decide by, but to say why a step was refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid};

use crate::users::User;

/// The settings that refuse namespaces.
const SYSCTLS: [&str; 10] = [
    "kernel.unprivileged_userns_clone",
    "kernel.apparmor_restrict_unprivileged_userns",
    "user.max_user_namespaces",
    "user.max_mnt_namespaces",
    "user.max_pid_namespaces",
    "user.max_net_namespaces",
    "user.max_ipc_namespaces",
    "user.max_uts_namespaces",
    "user.max_cgroup_namespaces",
    "kernel.keys.maxkeys",
];

/// What was read of the host.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Name and release of the kernel, and the machine.
    pub kernel: String,
    /// The user who runs this.
    pub uid: u32,
    /// The user's group.
    pub gid: u32,
    /// The user's name, if there is one.
    pub user: Option<String>,
    /// Whether the user may mount file systems here.
    pub is_admin: bool,
    /// Settings, by name as sysctl(8) writes it.
    pub sysctls: BTreeMap<&'static str, String>,
    /// The mounts that this process sees.
    pub mounts: Vec<MountLine>,
    /// `/proc/self/uid_map`.
    pub uid_map: String,
    /// `/etc/subuid`.
    pub subuid: String,
    /// `/etc/subgid`.
    pub subgid: String,
    /// How this process is confined by a system call filter: 0 not, 2 by one.
    pub seccomp: u32,
    /// Whether programs can't gain privileges here, whatever their set-id bits say.
    pub no_new_privs: bool,
    /// The AppArmor profile of this process, if it has one.
    pub apparmor: Option<String>,
    /// The container's kind, where there are signs of one.
    pub container: Option<String>,
    /// The cgroup (v2) of this process, as `/proc/self/cgroup` has it.
    pub cgroup: Option<String>,
    /// This program's file.
    pub program: PathBuf,
}

/// Who builds would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Root of the host.
    Root,
    /// Root of a container.
    ContainerRoot,
    /// An unprivileged user with a range of subordinate ids.
    Range,
    /// An unprivileged user without.
    Single,
}

impl Mode {
    /// The name for programs.
    pub fn id(self) -> &'static str {
        match self {
            Mode::Root => "root",
            Mode::ContainerRoot => "container-root",
            Mode::Range => "range",
            Mode::Single => "single",
        }
    }
}

/// A line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountLine {
    /// Which directory of the file system is mounted.
    pub root: String,
    /// Where.
    pub at: PathBuf,
    /// Options of the mount, separated by commas.
    pub options: String,
    /// The type of the file system.
    pub kind: String,
}

impl Host {
    /// Reads it. What can't be read is taken for absent.
    pub fn read() -> Self {
        let (uid, gid) = (Uid::effective(), Gid::effective());
        let status = text("/proc/self/status");
        Self {
            kernel: kernel(),
            uid: uid.as_raw(),
            gid: gid.as_raw(),
            user: User::with_id(uid.as_raw()).map(|user| user.name),
            is_admin: crate::ids::is_privileged(),
            sysctls: SYSCTLS.into_iter().filter_map(|name| Some((name, sysctl(name)?))).collect(),
            mounts: parse_mounts(&text("/proc/self/mountinfo")),
            uid_map: text("/proc/self/uid_map"),
            subuid: text("/etc/subuid"),
            subgid: text("/etc/subgid"),
            seccomp: status_field(&status, "Seccomp"),
            no_new_privs: status_field(&status, "NoNewPrivs") != 0,
            apparmor: fs::read_to_string("/proc/self/attr/apparmor/current")
                .ok()
                .map(|text| text.trim().into()),
            container: container(),
            cgroup: own_cgroup(&text("/proc/self/cgroup")),
            program: fs::read_link("/proc/self/exe").unwrap_or_else(|_| "cofferdam".into()),
        }
    }

    /// Who builds would be, as far as that is known before anything was tried.
    pub fn mode(&self) -> Mode {
        match (self.is_admin, self.owns_all_ids()) {
            (true, true) => Mode::Root,
            (true, false) => Mode::ContainerRoot,
            (false, _) => Mode::Single,
        }
    }

    /// Whether this is no user namespace below the first.
    fn owns_all_ids(&self) -> bool {
        self.uid_map.split_whitespace().eq(["0", "0", "4294967295"])
    }

    /// A setting.
    pub fn sysctl(&self, name: &str) -> Option<&str> {
        self.sysctls.get(name).map(String::as_str)
    }

    /// What this user is called in files such as `/etc/subuid`.
    pub fn user_name(&self) -> String {
        self.user.clone().unwrap_or_else(|| self.uid.to_string())
    }

    /// What is mounted over parts of `/proc`, but for the places that are there to be mounted on.
    pub fn masks_of_proc(&self) -> Vec<&Path> {
        // Directories that are always empty: what covers them hides nothing.
        const MOUNT_POINTS: [&str; 3] = ["/proc/sys/fs/binfmt_misc", "/proc/fs/nfsd", "/proc/openprom"];
        let within = |at: &&Path| at.starts_with("/proc") && *at != Path::new("/proc");
        let masks = self.mounts.iter().map(|mount| mount.at.as_path()).filter(within);
        masks.filter(|at| !MOUNT_POINTS.iter().any(|point| Path::new(point) == *at)).collect()
    }

    /// The mount of a whole procfs at `/proc`.
    pub fn proc_mount(&self) -> Option<&MountLine> {
        self.mounts.iter().rev().find(|mount| mount.at == Path::new("/proc") && mount.kind == "proc")
    }

    /// Whether this process is in a chroot: its root directory is no mount point.
    pub fn is_in_chroot(&self) -> bool {
        !self.mounts.is_empty() && !self.mounts.iter().any(|mount| mount.at == Path::new("/"))
    }

    /// The directory of this process's cgroup (v2).
    pub fn cgroup_dir(&self) -> Option<PathBuf> {
        let own = self.cgroup.as_deref()?;
        let mount = self.mounts.iter().find(|mount| mount.kind == "cgroup2")?;
        // In a container the mount may show a part of the tree alone, and call it the root.
        let below = Path::new(own).strip_prefix(&mount.root).ok()?;
        Some(mount.at.join(below))
    }
}

fn text(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn sysctl(name: &str) -> Option<String> {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    fs::read_to_string(path).ok().map(|value| value.trim().to_owned())
}

fn kernel() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |name| {
            let part = |part: &std::ffi::OsStr| part.to_string_lossy().into_owned();
            format!("{} {} {}", part(name.sysname()), part(name.release()), part(name.machine()))
        },
    )
}

fn status_field(status: &str, name: &str) -> u32 {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// The signs that container engines leave.
fn container() -> Option<String> {
    if Path::new("/run/.containerenv").exists() {
        return Some("podman".into());
    }
    if Path::new("/.dockerenv").exists() {
        return Some("docker".into());
    }
    // Written by systemd-nspawn, lxc and others, and passed on by systemd.
    fs::read_to_string("/run/systemd/container").ok().map(|kind| kind.trim().to_owned())
}

fn own_cgroup(cgroups: &str) -> Option<String> {
    cgroups.lines().find_map(|line| line.strip_prefix("0::")).map(str::to_owned)
}

/// The lines of a mountinfo file, see proc_pid_mountinfo(5).
fn parse_mounts(text: &str) -> Vec<MountLine> {
    let line = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        Some(MountLine {
            root: unescaped(fields.next()?),
            at: unescaped(fields.next()?).into(),
            options: fields.next()?.to_owned(),
            kind: after.split(' ').next()?.to_owned(),
        })
    };
    text.lines().filter_map(line).collect()
}

/// Takes back what mountinfo does to blanks: `\040` and the like.
fn unescaped(field: &str) -> String {
    let mut parts = field.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.zip(part.get(3..)) {
            Some((code, rest)) => {
                plain.push(char::from(code));
                plain.push_str(rest);
            }
            None => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a docker container sees, shortened.
    const DOCKER: &str = "\
600 500 0:50 / / rw,relatime master:1 - overlay overlay rw,lowerdir=/a
601 600 0:53 / /proc rw,nosuid,nodev,noexec,relatime - proc proc rw
602 601 0:53 /bus /proc/bus ro,nosuid,nodev,noexec,relatime - proc proc rw
603 601 0:61 / /proc/acpi ro,relatime - tmpfs tmpfs ro
604 601 0:55 /null /proc/kcore rw,nosuid - tmpfs tmpfs rw
605 600 0:62 / /mnt/with\\040blank rw - tmpfs none rw
606 600 0:63 /sub/tree /sys/fs/cgroup rw,relatime - cgroup2 cgroup rw
broken line
";

    #[test]
    fn what_covers_parts_of_proc_is_found() {
        let host = Host { mounts: parse_mounts(DOCKER), ..Host::default() };
        let masks: Vec<&str> = host.masks_of_proc().iter().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(masks, ["/proc/bus", "/proc/acpi", "/proc/kcore"]);
        assert!(host.proc_mount().is_some() && !host.is_in_chroot());
    }

    #[test]
    fn places_that_are_made_to_be_mounted_on_are_no_masks() {
        let text = "1 2 0:1 / /proc rw - proc proc rw\n\
                    3 1 0:2 / /proc/sys/fs/binfmt_misc rw - binfmt_misc none rw\n\
                    4 1 0:3 / /procedures rw - tmpfs none rw\n";
        let host = Host { mounts: parse_mounts(text), ..Host::default() };
        assert_eq!(host.masks_of_proc(), Vec::<&Path>::new());
        assert!(host.is_in_chroot(), "nothing is mounted on /");
    }

    #[test]
    fn blanks_in_mount_points_are_read() {
        let at = |host: &Host, path: &str| host.mounts.iter().any(|mount| mount.at == Path::new(path));
        let host = Host { mounts: parse_mounts(DOCKER), ..Host::default() };
        assert!(at(&host, "/mnt/with blank"));
        assert_eq!(unescaped("a\\134b\\9"), "a\\b\\9");
    }

    #[test]
    fn a_cgroup_is_found_where_the_mount_shows_it() {
        let host = |cgroups: &str| Host {
            mounts: parse_mounts(DOCKER),
            cgroup: own_cgroup(cgroups),
            ..Host::default()
        };
        let table = [
            ("3:pids:/x\n0::/sub/tree/a\n", Some("/sys/fs/cgroup/a")),
            ("0::/elsewhere\n", None),
            ("3:pids:/x\n", None),
        ];
        for (cgroups, dir) in table {
            assert_eq!(host(cgroups).cgroup_dir(), dir.map(PathBuf::from), "{cgroups}");
        }
    }

    #[test]
    fn root_of_a_container_is_told_from_root() {
        let host = |is_admin, map: &str| Host { is_admin, uid_map: map.into(), ..Host::default() };
        assert_eq!(host(true, "         0          0 4294967295\n").mode(), Mode::Root);
        assert_eq!(host(true, "0 100000 65536\n").mode(), Mode::ContainerRoot);
        assert_eq!(host(false, "0 0 4294967295\n").mode(), Mode::Single);
    }

    #[test]
    fn fields_of_status_are_read() {
        let status = "Name:\tx\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t7\n";
        assert_eq!((status_field(status, "Seccomp"), status_field(status, "NoNewPrivs")), (2, 1));
        assert_eq!(status_field("", "Seccomp"), 0);
    }
}
