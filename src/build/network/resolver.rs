//! `resolv.conf(5)` for a namespace that can't reach the host's loopback: pure, as everything that can be.
//!
//! A name server outside of the host stays as it is. One on the host itself, such as the stub of systemd-resolved at
//! 127.0.0.53, is out of reach: the namespace has a loopback of its own, and the host's addresses too. pasta forwards to
//! the first of each family, as the host's file lists them, and to no other.

use std::net::IpAddr;

use cofferdam_sandbox::pasta::{INTERFACE, NAMES_IPV4, NAMES_IPV6};

/// What of the host the configuration depends on.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// Its own addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether it reaches others over IPv4; only then does pasta.
    pub has_ipv4: bool,
    /// The same for IPv6.
    pub has_ipv6: bool,
    /// The name servers that its stub asks, in the form of resolv.conf; empty where nothing tells.
    pub uplinks: Vec<u8>,
}

/// A namespace's configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Resolver {
    /// Its resolv.conf.
    pub text: Vec<u8>,
    /// Where pasta is to answer, at most one address of each family.
    pub name_servers: Vec<IpAddr>,
}

/// The namespace's configuration, from the host's.
pub fn rewrite(resolv_conf: &[u8], host: &Host) -> Resolver {
    let mut resolver = Resolver { text: Vec::new(), name_servers: Vec::new() };
    let mut lines: Vec<String> = Vec::new();
    let mut seen = Vec::new();
    for server in servers(resolv_conf) {
        let at = stand_in(server.address);
        let is_first = !seen.contains(&at);
        seen.push(at);
        let line = match host.is_own(server.address) {
            false => server.within(),
            true if is_first && host.reaches(at) => {
                resolver.name_servers.push(at);
                at.to_string()
            }
            true => continue,
        };
        lines.push(line);
    }
    if lines.is_empty() {
        // Rather those that the stub asks than none.
        let uplinks = servers(&host.uplinks).into_iter().filter(|server| !host.is_own(server.address));
        lines.extend(uplinks.map(|server| server.within()));
    }
    for line in lines {
        resolver.text.extend_from_slice(format!("nameserver {line}\n").as_bytes());
    }
    for line in resolv_conf.split(|byte| *byte == b'\n').filter(|line| is_kept(line)) {
        resolver.text.extend_from_slice(line);
        resolver.text.push(b'\n');
    }
    resolver
}

impl Host {
    fn is_own(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_loopback() || address.is_unspecified() || self.addresses.contains(&address)
    }

    fn reaches(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(_) => self.has_ipv4,
            IpAddr::V6(_) => self.has_ipv6,
        }
    }
}

/// Where pasta answers for a name server of this family.
fn stand_in(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => NAMES_IPV4.into(),
        IpAddr::V6(_) => NAMES_IPV6.into(),
    }
}

/// A name server.
struct Server {
    address: IpAddr,
    /// Whether an interface of the host was named with it.
    scoped: bool,
}

impl Server {
    /// How it is written in the namespace, which has one interface.
    fn within(&self) -> String {
        match self.scoped {
            true => format!("{}%{INTERFACE}", self.address),
            false => self.address.to_string(),
        }
    }
}

/// The name servers in order. What is no address is nobody's.
fn servers(resolv_conf: &[u8]) -> Vec<Server> {
    let lines = resolv_conf.split(|byte| *byte == b'\n').filter(|line| keyword(line) == b"nameserver");
    let server = |line: &[u8]| {
        let value = line.split(|byte| byte.is_ascii_whitespace()).filter(|word| !word.is_empty()).nth(1)?;
        let mut parts = str::from_utf8(value).ok()?.splitn(2, '%');
        let address = parts.next()?.parse().ok()?;
        Some(Server { address, scoped: parts.next().is_some() })
    };
    lines.filter_map(server).collect()
}

/// Whether a line says something that holds in the namespace as well.
fn is_kept(line: &[u8]) -> bool {
    [b"domain".as_slice(), b"search", b"options", b"sortlist"].contains(&keyword(line))
}

/// The first word, which must begin the line.
fn keyword(line: &[u8]) -> &[u8] {
    line.split(|byte| byte.is_ascii_whitespace()).next().unwrap_or_default()
}

/// The flag of a route that is in use.
const UP: u32 = 0x1;
/// The flag of a route that leads nowhere.
const REJECT: u32 = 0x200;

/// Whether `/proc/net/route` has a way to everywhere.
pub fn has_ipv4_route(table: &str) -> bool {
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            [_, "00000000", _, flags, _, _, _, "00000000", ..] => is_in_use(flags),
            _ => false,
        }
    })
}

/// The same for `/proc/net/ipv6_route`.
pub fn has_ipv6_route(table: &str) -> bool {
    table.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            [to, "00", _, _, _, _, _, _, flags, device] => {
                to.bytes().all(|digit| digit == b'0') && *device != "lo" && is_in_use(flags)
            }
            _ => false,
        }
    })
}

fn is_in_use(flags: &str) -> bool {
    u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & (UP | REJECT) == UP)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STUB: &str = "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.org\n";

    fn host() -> Host {
        Host {
            addresses: vec![[192, 0, 2, 7].into(), "fd00::7".parse().unwrap()],
            has_ipv4: true,
            has_ipv6: true,
            uplinks: b"nameserver 192.0.2.1\nnameserver fd00::1\n".to_vec(),
        }
    }

    fn only_ipv6() -> Host {
        Host { has_ipv4: false, ..host() }
    }

    fn unknown_uplinks() -> Host {
        Host { uplinks: Vec::new(), ..only_ipv6() }
    }

    /// resolv.conf, the host, what the namespace's nameserver lines say, and for how many of them pasta answers.
    type Row = (&'static str, &'static str, fn() -> Host, &'static [&'static str], usize);

    const ROWS: [Row; 22] = [
        ("one outside", "nameserver 9.9.9.9\n", host, &["9.9.9.9"], 0),
        (
            "several",
            "nameserver 9.9.9.9\nnameserver 2620:fe::fe\nnameserver 8.8.8.8",
            host,
            &["9.9.9.9", "2620:fe::fe", "8.8.8.8"],
            0,
        ),
        ("a stub", STUB, host, &["169.254.1.1"], 1),
        ("a stub over IPv6", "nameserver ::1\n", host, &["fd63:6f66:6665:7264::53"], 1),
        (
            "both",
            "nameserver 127.0.0.1\nnameserver ::1\n",
            host,
            &["169.254.1.1", "fd63:6f66:6665:7264::53"],
            2,
        ),
        ("two stubs", "nameserver 127.0.0.53\nnameserver 127.0.0.54\n", host, &["169.254.1.1"], 1),
        (
            "a stub, then one outside",
            "nameserver 127.0.0.1\nnameserver 9.9.9.9\n",
            host,
            &["169.254.1.1", "9.9.9.9"],
            1,
        ),
        ("one outside, then a stub", "nameserver 9.9.9.9\nnameserver 127.0.0.1\n", host, &["9.9.9.9"], 0),
        (
            "one outside, then a stub of the other family",
            "nameserver 9.9.9.9\nnameserver ::1\n",
            host,
            &["9.9.9.9", "fd63:6f66:6665:7264::53"],
            1,
        ),
        ("an address of the host's", "nameserver 192.0.2.7\n", host, &["169.254.1.1"], 1),
        ("the same over IPv6", "nameserver fd00::7\n", host, &["fd63:6f66:6665:7264::53"], 1),
        (
            "any address",
            "nameserver 0.0.0.0\nnameserver ::\n",
            host,
            &["169.254.1.1", "fd63:6f66:6665:7264::53"],
            2,
        ),
        ("none, but uplinks", "search example.org\n", host, &["192.0.2.1", "fd00::1"], 0),
        ("nothing at all", "", unknown_uplinks, &[], 0),
        ("on a link", "nameserver fe80::1%enp3s0\n", host, &["fe80::1%eth0"], 0),
        ("a stub of a family that is not to be had", STUB, only_ipv6, &["192.0.2.1", "fd00::1"], 0),
        ("and nobody knows whom it asks", STUB, unknown_uplinks, &[], 0),
        (
            "one of the family, and another",
            "nameserver 127.0.0.1\nnameserver 2620:fe::fe\n",
            only_ipv6,
            &["2620:fe::fe"],
            0,
        ),
        ("tabs and more words", "nameserver\t 9.9.9.9 # mine\n", host, &["9.9.9.9"], 0),
        (
            "a comment",
            "#nameserver 8.8.8.8\n;nameserver 8.8.4.4\nnameserver 9.9.9.9\n",
            host,
            &["9.9.9.9"],
            0,
        ),
        ("not at the beginning", " nameserver 8.8.8.8\nnameserver 9.9.9.9\n", host, &["9.9.9.9"], 0),
        (
            "no address",
            "nameserver\nnameserver dns\nnameserver 1.2.3\nnameserver 9.9.9.9\n",
            host,
            &["9.9.9.9"],
            0,
        ),
    ];

    #[test]
    fn name_servers_are_in_reach() {
        for (name, text, host, expected, forwarded) in ROWS {
            let Resolver { text, name_servers } = rewrite(text.as_bytes(), &host());
            let text = String::from_utf8(text).unwrap();
            let seen: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("nameserver ")).collect();
            assert_eq!(seen, expected, "{name}");
            assert_eq!(name_servers.len(), forwarded, "{name}");
            for at in name_servers {
                assert!(seen.contains(&at.to_string().as_str()), "{name}");
            }
        }
    }

    #[test]
    fn the_rest_is_kept_byte_by_byte() {
        let text = b"nameserver 127.0.0.1\n# by \xff\nsearch a.example b.example\noptions ndots:2\n\ndomain \xfe\nsortlist 10.0.0.0\nlookup file";
        let expected =
            b"nameserver 169.254.1.1\nsearch a.example b.example\noptions ndots:2\ndomain \xfe\nsortlist 10.0.0.0\n";
        assert_eq!(rewrite(text, &host()).text, expected);
        assert_eq!(
            rewrite(STUB.as_bytes(), &host()).text,
            STUB.replace("127.0.0.53", "169.254.1.1").into_bytes()
        );
    }

    #[test]
    fn routes() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n";
        let ipv4 = [
            ("eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0", true),
            ("eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0", false),
            ("*\t00000000\t00000000\t0201\t0\t0\t0\t00000000\t0\t0\t0", false),
            ("eth0\t00000000\t010200C0\t0002\t0\t0\t0\t00000000\t0\t0\t0", false),
            ("", false),
        ];
        for (line, expected) in ipv4 {
            assert_eq!(has_ipv4_route(&format!("{head}{line}\n")), expected, "{line}");
        }
        let zero = "00000000000000000000000000000000";
        let route = |to: &str, len: &str, flags: &str, device: &str| {
            format!(
                "{to} {len} {zero} 00 fd000000000000000000000000000001 00000400 00000001 00000000 {flags} {device}\n"
            )
        };
        let ipv6 = [
            (route(zero, "00", "00450003", "eth0"), true),
            (route(zero, "00", "00200200", "lo"), false),
            (route(zero, "00", "00000201", "eth0"), false),
            (route("fd000000000000000000000000000000", "40", "00000001", "eth0"), false),
            (String::new(), false),
        ];
        for (table, expected) in ipv6 {
            assert_eq!(has_ipv6_route(&table), expected, "{table}");
        }
    }
}
