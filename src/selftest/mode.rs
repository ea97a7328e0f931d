//! Who runs the worker: the three kinds of user, and how root becomes each of them.

use std::fmt;
use std::path::Path;

use clap::ValueEnum;
use cofferdam_sandbox::users::User;
use nix::unistd::{Gid, Uid};
use serde::{Deserialize, Serialize};

/// Who runs the worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Root.
    Root,
    /// An unprivileged user with a range of subordinate ids.
    Range,
    /// An unprivileged user with no id but its own.
    Single,
}

impl Mode {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Root, Self::Range, Self::Single];

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Range => "range",
            Self::Single => "single",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a user can expect to be run: modes, and being in a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Expected {
    /// The mode of root.
    Root,
    /// The mode of a user with subordinate ids.
    Range,
    /// The mode of a user without.
    Single,
    /// Any mode, in a container.
    Container,
}

/// A user and a group to become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Become {
    /// The user.
    pub uid: Uid,
    /// Its group.
    pub gid: Gid,
}

/// A mode that can be run, or why it can't.
#[derive(Debug)]
pub struct Available {
    /// The mode.
    pub mode: Mode,
    /// Whom to become for it; `None`: this process is it already.
    pub user: Result<Option<Become>, String>,
}

/// The modes that whoever runs this can be in.
pub fn available() -> Vec<Available> {
    let own = own_mode();
    Mode::ALL.map(|mode| Available { mode, user: user_for(mode, own) }).into()
}

fn own_mode() -> Mode {
    let uid = Uid::effective();
    match (uid.is_root(), has_range(uid)) {
        (true, _) => Mode::Root,
        (false, true) => Mode::Range,
        (false, false) => Mode::Single,
    }
}

fn user_for(mode: Mode, own: Mode) -> Result<Option<Become>, String> {
    match (mode, own) {
        _ if mode == own => Ok(None),
        (Mode::Range, Mode::Root) => range_user().and_then(there).map(Some),
        (Mode::Single, Mode::Root) => single_user().and_then(there).map(Some),
        (Mode::Root, _) => Err("run it as root".into()),
        (Mode::Range, _) => {
            Err("this user has no range in /etc/subuid and /etc/subgid, or newuidmap is not \
                                 installed (Debian: uidmap, Fedora: shadow-utils)"
                .into())
        }
        // A user with a range can do without.
        (Mode::Single, _) => Ok(None),
    }
}

/// A user who has a range.
fn range_user() -> Result<Become, String> {
    let ranges = std::fs::read_to_string("/etc/subuid").unwrap_or_default();
    let users = ranges.lines().filter_map(|line| {
        let owner = line.split(':').next()?;
        let by_id = owner.parse().ok().and_then(User::with_id);
        by_id.or_else(|| User::named(owner))
    });
    let found = users.filter(|user| user.uid != 0).find(|user| has_range(Uid::from_raw(user.uid)));
    found.map(|user| Become { uid: Uid::from_raw(user.uid), gid: Gid::from_raw(user.gid) }).ok_or_else(|| {
        "no user but root has a range in both /etc/subuid and /etc/subgid, or newuidmap is not installed (Debian: \
         uidmap, Fedora: shadow-utils)"
            .into()
    })
}

/// Nobody, or should that one have a range, an id that is nobody's at all.
fn single_user() -> Result<Become, String> {
    [65534, 64321, 64322]
        .map(Uid::from_raw)
        .into_iter()
        .find(|uid| !has_range(*uid))
        .map(|uid| Become { uid, gid: Gid::from_raw(uid.as_raw()) })
        .ok_or_else(|| "every user there is has subordinate ids".into())
}

/// A user whose ids exist in this user namespace.
fn there(user: Become) -> Result<Become, String> {
    for (file, id) in [("uid_map", user.uid.as_raw()), ("gid_map", user.gid.as_raw())] {
        let map = std::fs::read_to_string(Path::new("/proc/self").join(file)).unwrap_or_default();
        if !is_mapped(&map, id) {
            return Err(format!("this container has no id {id} to run it under (/proc/self/{file})"));
        }
    }
    Ok(user)
}

/// Whether an id map as `/proc/PID/uid_map` shows it has this id.
fn is_mapped(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let mut fields = line.split_whitespace().map(|field| field.parse::<u64>().ok());
        let (Some(Some(first)), Some(Some(_)), Some(Some(len))) =
            (fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        (first..first + len).contains(&u64::from(id))
    })
}

fn has_range(uid: Uid) -> bool {
    let name = User::with_id(uid.as_raw()).map(|user| user.name);
    let owns = |file: &str| {
        let lines = std::fs::read_to_string(file).unwrap_or_default();
        lines
            .lines()
            .filter_map(|line| line.split(':').next())
            .any(|owner| name.as_deref() == Some(owner) || owner.parse() == Ok(uid.as_raw()))
    };
    let installed = |tool: &str| {
        ["/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin", "/sbin", "/run/wrappers/bin"]
            .iter()
            .any(|dir| Path::new(dir).join(tool).is_file())
    };
    owns("/etc/subuid") && owns("/etc/subgid") && installed("newuidmap") && installed("newgidmap")
}

/// Why this is taken for a container; `None`: nothing says that it is one.
pub fn container() -> Option<String> {
    for file in ["/run/.containerenv", "/.dockerenv", "/run/systemd/container"] {
        if Path::new(file).exists() {
            return Some(format!("there is {file}"));
        }
    }
    let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let whole = map.split_whitespace().eq(["0", "0", "4294967295"]);
    if !whole && !map.trim().is_empty() {
        return Some("it is in a user namespace of its own".into());
    }
    let environment = std::fs::read("/proc/1/environ").unwrap_or_default();
    let told = environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(b"container="));
    told.then(|| "its first process has the variable \"container\"".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_mapped_or_not() {
        let cases = [
            ("0 0 4294967295\n", 65534, true),
            ("0 1000 1\n1 100000 65536\n", 65534, true),
            ("0 1000 1\n", 65534, false),
            ("0 1000 1\n", 0, true),
            ("", 0, false),
            ("nonsense\n", 0, false),
        ];
        for (map, id, expected) in cases {
            assert_eq!(is_mapped(map, id), expected, "{id} in {map:?}");
        }
    }
}
