//! SEC

use crate::selftest::Probe;

pub(super) const PROBES: &[Probe] = &[];
