//! The probes, a file a family. Ids and what is expected are those of the isolation catalogue in `docs/isolation.md`.

use super::Probe;

mod cap;
mod dev;
mod fs;
mod net;
mod pr;
mod ps;
mod sec;
mod tools;

/// The families, in the catalogue's order.
pub const FAMILIES: &[&[Probe]] =
    &[fs::PROBES, pr::PROBES, net::PROBES, dev::PROBES, ps::PROBES, cap::PROBES, sec::PROBES];
