//! `cofferdam run`, from outside, as each kind of user.

use std::process::ExitCode;

#[path = "../support/mod.rs"]
mod support;

mod attacks;
mod confinement;
mod copies;
mod data;
mod endings;
mod faults;
mod limits;
mod network;
mod sandbox;
mod streams;

fn main() -> ExitCode {
    let mut trials = support::in_every_mode(streams::tests());
    trials.extend(support::in_every_mode(data::tests()));
    trials.extend(support::in_every_mode(sandbox::tests()));
    trials.extend(support::in_every_mode(endings::tests()));
    trials.extend(support::in_every_mode(faults::tests()));
    trials.extend(support::in_every_mode(attacks::tests()));
    trials.extend(support::in_every_mode_without_fuse(copies::tests()));
    trials.extend(support::in_every_mode(copies::tests_with_fuse()));
    let without_the_device =
        |mode| support::without_fuse("without_the_device", mode, copies::without_the_device);
    trials.extend(support::Mode::ALL.map(without_the_device));
    trials.extend(support::in_every_mode(confinement::tests()));
    trials.extend(confinement::by_other_ways());
    trials.extend(support::in_every_mode(limits::tests()));
    trials.extend(support::in_own_mode(limits::tests_in_own_mode()));
    trials.extend(limits::cgroup_tests());
    trials.extend(network::trials());
    trials.push(support::in_mode("full_disk", support::Mode::Root, faults::full_disk));
    support::run(trials)
}
