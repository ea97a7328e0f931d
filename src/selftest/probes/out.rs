use super::*;
pub(super) const PROBES: &[Probe] = &[];
