//! DEV: devices.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{Mode as Bits, SFlag, makedev, mknod};

use super::tools::names;
use crate::build::error::{Fault, Unsupported};
use crate::selftest::stage::{End, Stage};
use crate::selftest::{Act, Company, Findings, Outcome, Play, Probe, Weight};

pub(super) const PROBES: &[Probe] = &[
    Probe {
        id: "DEV-01",
        promise: "/dev holds what every build needs and nothing else",
        weight: Weight::Required,
        company: Company::Shared,
        attack: known_devices_only,
        play: Play::Plain,
    },
    Probe {
        id: "DEV-02",
        promise: "device nodes can't be made, and would not work",
        weight: Weight::Required,
        company: Company::Shared,
        attack: make_devices,
        play: Play::Plain,
    },
    Probe {
        id: "DEV-03",
        promise: "the host's device nodes can't be changed or removed",
        weight: Weight::Desired,
        company: Company::Shared,
        attack: change_devices,
        play: Play::Plain,
    },
    Probe {
        id: "DEV-05",
        promise: "a request gets no device that the operator did not allow",
        weight: Weight::Required,
        company: Company::Shared,
        attack: |_, findings| findings.check(false, "it was let in"),
        play: Play::Script(|stage| Box::pin(ask_for_devices(stage))),
    },
];

const DEVICES: [&str; 6] = ["full", "null", "random", "tty", "urandom", "zero"];
const OTHERS: [&str; 7] = ["fd", "ptmx", "pts", "shm", "stderr", "stdin", "stdout"];

fn known_devices_only(_: &Act, findings: &mut Findings) {
    if let Some(seen) = findings.works("list /dev", names("/dev")) {
        let mut expected: Vec<String> =
            DEVICES.iter().chain(&OTHERS).map(|name| (*name).to_owned()).collect();
        expected.sort();
        findings.same("/dev", seen.into_iter().collect::<Vec<_>>(), expected);
    }
    let nodes = [("full", 7), ("null", 3), ("random", 8), ("urandom", 9), ("zero", 5)];
    for (node, minor) in nodes {
        if let Some(found) = findings.works(node, fs::metadata(Path::new("/dev").join(node))) {
            findings.same(node, found.rdev(), makedev(1, minor));
        }
    }
    for absent in
        ["mem", "kmem", "port", "kmsg", "fuse", "net/tun", "loop-control", "loop0", "console", "sda", "kvm"]
    {
        let path = Path::new("/dev").join(absent);
        findings.refused(&format!("open {}", path.display()), fs::File::open(&path), &[Errno::ENOENT]);
    }
    findings.refused("open /dev/tty", fs::File::open("/dev/tty"), &[Errno::ENXIO]);
}

fn make_devices(_: &Act, findings: &mut Findings) {
    let kinds = [("null", SFlag::S_IFCHR, makedev(1, 3)), ("disk", SFlag::S_IFBLK, makedev(8, 0))];
    for dir in ["/build", "/tmp", "/nix/store", "/dev/shm"] {
        for (name, kind, device) in kinds {
            let path = Path::new(dir).join(name);
            let made = mknod(&path, kind, Bits::from_bits_truncate(0o666), device);
            findings.refused(&format!("make {}", path.display()), made, &[Errno::EPERM]);
        }
    }
}

fn change_devices(_: &Act, findings: &mut Findings) {
    let refusals = [Errno::EPERM, Errno::EROFS, Errno::EACCES, Errno::EBUSY];
    for name in DEVICES {
        let path = Path::new("/dev").join(name);
        let mode = fs::Permissions::from_mode(0o777);
        findings.refused(&format!("chmod {name}"), fs::set_permissions(&path, mode), &refusals);
        findings.refused(
            &format!("chown {name}"),
            std::os::unix::fs::chown(&path, Some(1000), None),
            &refusals,
        );
        findings.refused(&format!("remove {name}"), fs::remove_file(&path), &refusals);
    }
}

async fn ask_for_devices(stage: &Stage<'_>) -> Outcome {
    let mut outcome = Outcome::Held;
    for device in ["/dev/kvm", "/dev/mem", "/dev/sda", "/dev/fuse", "/dev/null", "/dev/net/tun", "/dev"] {
        let Ok(mut draft) = stage.draft("", &[]) else { return Outcome::broken("no request") };
        draft.constraints.ro_paths.push(PathBuf::from(device));
        let ended = stage.run(draft).await;
        outcome = outcome.and(match ended.end {
            End::Fault(Fault::Unsupported(Unsupported::HostPath { .. }) | Fault::Invalid(_)) => Outcome::Held,
            _ => Outcome::broken(format!("a request for {device}: {}", ended.describe())),
        });
    }
    outcome
}
