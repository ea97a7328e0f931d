//! Compiles the policies to the programs that the kernel takes, so that a sandbox only hands one over.

use std::fmt::{Display, Write};
use std::path::Path;
use std::{env, fs, process};

#[path = "src/seccomp/compile.rs"]
mod compile;
#[path = "src/seccomp/policy.rs"]
mod policy;

use policy::{Policy, Table};

const SOURCES: [&str; 4] = ["build.rs", "policy", "src/seccomp/compile.rs", "src/seccomp/policy.rs"];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    let table = parsed("policy/syscalls", Table::parse);
    let parity = parsed("policy/parity.policy", |text| Policy::parse(text, &[]));
    let strict = parsed("policy/strict.policy", |text| Policy::parse(text, &[("parity", &parity)]));

    let target = variable("CARGO_CFG_TARGET_ARCH");
    let abis = compile::abis_of(&target)
        .unwrap_or_else(|| fail("policy/syscalls", format_args!("it has no column for {target}")));
    let mut code = String::new();
    for (name, policy) in [("PARITY", &parity), ("STRICT", &strict)] {
        let program = compile::compile(policy, &table, abis).unwrap_or_else(|error| fail("policy", error));
        let _ = writeln!(code, "static {name}: [libc::sock_filter; {}] = [", program.len());
        for compile::Instruction { code: operation, jt, jf, k } in program {
            let _ = writeln!(
                code,
                "    libc::sock_filter {{ code: {operation:#x}, jt: {jt}, jf: {jf}, k: {k:#x} }},"
            );
        }
        code.push_str("];\n");
    }
    let file = Path::new(&variable("OUT_DIR")).join("programs.rs");
    fs::write(&file, code).unwrap_or_else(|error| fail(&file.display().to_string(), error));
}

fn parsed<T, E: Display>(file: &str, parse: impl Fn(&str) -> Result<T, E>) -> T {
    let text = fs::read_to_string(file).unwrap_or_else(|error| fail(file, error));
    parse(&text).unwrap_or_else(|error| fail(file, error))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| fail(name, error))
}

fn fail(file: &str, error: impl Display) -> ! {
    println!("cargo::error={file}: {error}");
    process::exit(1)
}
