//! The sandbox's own network: loopback, and what pasta adds.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::frame::Own;
use crate::plan::Network;
use crate::report::{SetupFailure, Step};
use crate::sabotage::{Layer, kept};
use crate::sys;

/// How many milliseconds pasta may take. It needs some tens of them; on a busy machine, more.
const PATIENCE_MS: u16 = 20_000;

/// How long the kernel may take to make sure that nobody else has an address. It does within two seconds.
const ADDRESS_PATIENCE: Duration = Duration::from_secs(4);

/// Brings up loopback where the network is the sandbox's own.
pub fn begin(network: Own) -> Result<(), SetupFailure> {
    match network {
        Own::Own if !kept(Layer::Network) => Ok(()),
        // 127.0.0.1 and ::1 come with the interface.
        Own::Own => sys::loopback_up().map_err(|errno| SetupFailure::new(Step::Loopback, errno, "")),
        Own::Shared => Ok(()),
    }
}

/// Waits until the network is connected where it is to be. The spawner then sends a byte over `go`.
pub fn set_up(network: &Network, go: &mut File) -> Result<(), SetupFailure> {
    match network {
        Network::Pasta { .. } if kept(Layer::Network) => {
            await_network(go).map_err(|errno| SetupFailure::new(Step::AwaitNetwork, errno, "with pasta"))?;
            await_addresses();
            Ok(())
        }
        Network::Own | Network::Host | Network::Pasta { .. } => Ok(()),
    }
}

fn await_network(go: &mut File) -> Result<(), Errno> {
    let mut there = [PollFd::new(go.as_fd(), PollFlags::POLLIN)];
    if poll(&mut there, PollTimeout::from(PATIENCE_MS))? == 0 {
        return Err(Errno::ETIMEDOUT);
    }
    go.read_exact(&mut [0]).map_err(|_| Errno::EPIPE)
}

/// Waits until the addresses can be used: some versions of pasta leave the kernel to look for others that have the same
/// one. There are no others, but it takes its time. That of the link alone is of no use to anybody, and not waited for.
fn await_addresses() {
    let start = Instant::now();
    while start.elapsed() < ADDRESS_PATIENCE {
        match std::fs::read_to_string("/proc/self/net/if_inet6") {
            Ok(addresses) if has_tentative(&addresses) => std::thread::sleep(Duration::from_millis(10)),
            // Without that file there are no such addresses.
            _ => return,
        }
    }
}

/// Whether one of the addresses, as `/proc/net/if_inet6` lists them, is still being looked into: the fourth field is the
/// scope, 00 for everywhere, and the fifth has the flags, of which 0x40 says so.
fn has_tentative(addresses: &str) -> bool {
    addresses.lines().any(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        match fields.as_slice() {
            [_, _, _, "00", flags, _] => u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & 0x40 != 0),
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tentative_addresses_are_found() {
        let lo = "00000000000000000000000000000001 01 80 10 80       lo\n";
        let used = "fd000000000000000000000000000002 02 40 00 80     eth0\n";
        let tentative = "fd000000000000000000000000000002 02 40 00 c0     eth0\n";
        let of_the_link = "fe800000000000000000000000000002 02 40 20 c0     eth0\n";
        for (addresses, expected) in [
            (vec![], false),
            (vec![lo, used], false),
            (vec![lo, tentative], true),
            (vec![of_the_link], false),
            (vec!["nonsense"], false),
        ] {
            assert_eq!(has_tentative(&addresses.concat()), expected, "{addresses:?}");
        }
    }
}
