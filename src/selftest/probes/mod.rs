//! The probes, a file a family. Ids and what is expected are those of the isolation catalogue in `docs/isolation.md`.

use super::Probe;

mod api;
mod can;
mod cap;
mod dev;
mod fs;
mod inp;
mod leak;
mod net;
mod out;
mod pr;
mod ps;
mod res;
mod sec;
mod second;
mod sto;
mod tools;

/// The families, in the catalogue's order.
pub const FAMILIES: &[&[Probe]] = &[
    fs::PROBES,
    pr::PROBES,
    net::PROBES,
    dev::PROBES,
    ps::PROBES,
    cap::PROBES,
    sec::PROBES,
    res::PROBES,
    out::PROBES,
    inp::PROBES,
    leak::PROBES,
    can::PROBES,
    api::PROBES,
    sto::PROBES,
];
