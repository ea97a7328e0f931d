//! What the kernel may ask of the view, in any order: see `cofferdam::view::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cofferdam::view::fuzzing::lookups(bytes));
