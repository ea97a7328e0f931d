//! Users by name and id. Not through the C library: in a static program it loads, of whatever version the host has, what
//! `/etc/nsswitch.conf` names, and may well crash there. Users that are not in `/etc/passwd` are asked of `getent(1)`.

use std::process::{Command, Stdio};

/// A line of `passwd(5)`, as far as it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// What the user is called.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// The id of the user's own group.
    pub gid: u32,
}

impl User {
    /// The user with this id.
    pub fn with_id(uid: u32) -> Option<User> {
        find(&uid.to_string(), |user| user.uid == uid)
    }

    /// The user with this name.
    pub fn named(name: &str) -> Option<User> {
        find(name, |user| user.name == name)
    }

    fn parse(line: &str) -> Option<User> {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        Some(User { name, uid, gid })
    }
}

fn find(key: &str, is_meant: impl Fn(&User) -> bool) -> Option<User> {
    let among = |lines: &str| lines.lines().filter_map(User::parse).find(&is_meant);
    among(&std::fs::read_to_string("/etc/passwd").unwrap_or_default()).or_else(|| {
        let asked = Command::new("getent").args(["passwd", "--", key]).stderr(Stdio::null()).output().ok()?;
        among(&String::from_utf8_lossy(&asked.stdout))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let me = User { name: "me".into(), uid: 1000, gid: 100 };
        for (line, expected) in [
            ("me:x:1000:100:Me:/home/me:/bin/sh", Some(me.clone())),
            ("me::1000:100", Some(me)),
            ("me:x:-1:100::/:", None),
            ("me", None),
            ("", None),
        ] {
            assert_eq!(User::parse(line), expected, "{line}");
        }
    }

    #[test]
    fn root_is_found_both_ways_and_nobody_else_by_chance() {
        assert_eq!(User::with_id(0).unwrap().name, "root");
        assert_eq!(User::named("root").unwrap().uid, 0);
        assert_eq!(User::named("no user has this name"), None);
        assert_eq!(User::with_id(4_000_000_001), None);
    }
}
