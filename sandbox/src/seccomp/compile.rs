//! From a policy to the program that the kernel runs before every system call.
//!
//! ```text
//! which ABI? ─▶ which number? ─▶ allowed, refused, or: look at the arguments
//! (dispatch)    (binary search)  (seccompiler's part)
//! ```
//!
//! seccompiler makes programs for one ABI with one refusal, and looks for a number one by one. The kernel runs a new
//! program once for each number of each ABI, to know which are always allowed and never need it again. So each part of
//! seccompiler's is for one call alone, and is found by a search.
//!
//! Used by the build script, and by the tests.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::policy::{Abi, Comparison, Condition, Policy, Refusal, Rule, Table};

/// One instruction of a program.
pub use seccompiler::sock_filter as Instruction;

// Of linux/bpf_common.h and linux/seccomp.h.
const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const OFFSET_OF_NUMBER: u32 = 0;
const OFFSET_OF_ARCH: u32 = 4;
/// The longest program that the kernel takes.
const MAX_LEN: usize = 4096;

/// Why there is no program.
#[derive(Debug)]
pub enum Error {
    /// A rule names a call that is not in the table.
    UnknownCall(String),
    /// seccompiler takes no such rule.
    Rule(BackendError),
    /// What seccompiler made does not begin as it did when this was written.
    Prologue,
    /// The program has more instructions than the kernel takes.
    TooLong(usize),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Error::UnknownCall(call) => write!(f, "{call} is not in the table of system calls"),
            Error::Rule(error) => write!(f, "a rule: {error}"),
            Error::Prologue => write!(f, "seccompiler's programs begin in an unknown way"),
            Error::TooLong(len) => {
                write!(f, "the program has {len} instructions, and the kernel takes {MAX_LEN}")
            }
        }
    }
}

impl From<BackendError> for Error {
    fn from(error: BackendError) -> Self {
        Error::Rule(error)
    }
}

/// The ABIs that a kernel of this architecture may offer, the native one first.
pub fn abis_of(target_arch: &str) -> Option<&'static [Abi]> {
    match target_arch {
        // x32 has the architecture of x86_64 and numbers far above all others: it is refused with what is unknown.
        "x86_64" => Some(&[Abi::X86_64, Abi::I386]),
        "aarch64" => Some(&[Abi::Aarch64, Abi::Arm]),
        _ => None,
    }
}

/// Makes the program.
pub fn compile(policy: &Policy, table: &Table, abis: &[Abi]) -> Result<BpfProgram, Error> {
    let mut program = vec![statement(LOAD_WORD, OFFSET_OF_ARCH)];
    for abi in abis {
        let rules = rules_of(policy, table, *abi)?;
        program.push(jump(JUMP_IF_EQUAL, abi.audit_arch(), 1, 0));
        program.push(statement(JUMP, 1 + rules.len() as u32));
        program.push(statement(LOAD_WORD, OFFSET_OF_NUMBER));
        program.extend(rules);
    }
    program.push(refuse(Refusal::UNKNOWN_CALL));
    match program.len() {
        len if len > MAX_LEN => Err(Error::TooLong(len)),
        _ => Ok(program),
    }
}

/// The program for one ABI, once the number is loaded.
fn rules_of(policy: &Policy, table: &Table, abi: Abi) -> Result<BpfProgram, Error> {
    // What is done about each number, from the key to the next one.
    let mut ranges = BTreeMap::from([(0, vec![refuse(Refusal::UNKNOWN_CALL)])]);
    for assigned in &table.assigned[abi as usize] {
        ranges.insert(*assigned.start(), vec![allow()]);
        ranges.insert(assigned.end() + 1, vec![refuse(Refusal::UNKNOWN_CALL)]);
    }
    for (call, rule) in &policy.rules {
        if !table.calls.contains_key(call) {
            return Err(Error::UnknownCall(call.clone()));
        }
        if let Some(number) = table.number(call, abi) {
            insert(&mut ranges, number, part(number, rule)?);
        }
    }
    // A tracer has taken the call's place: the kernel will do nothing.
    insert(&mut ranges, u32::MAX, vec![allow()]);
    let mut ranges: Vec<(u32, BpfProgram)> = ranges.into_iter().collect();
    ranges.dedup_by(|next, range| next.1 == range.1);
    Ok(search(&ranges))
}

/// Cuts one number out of the range that holds it.
fn insert(ranges: &mut BTreeMap<u32, BpfProgram>, number: u32, part: BpfProgram) {
    let around = ranges.range(..=number).next_back().map(|(_, around)| around.clone());
    if let (Some(next), Some(around)) = (number.checked_add(1), around) {
        ranges.entry(next).or_insert(around);
    }
    ranges.insert(number, part);
}

/// Finds the range of the number that is loaded, and goes on with its part.
fn search(ranges: &[(u32, BpfProgram)]) -> BpfProgram {
    match ranges {
        [(_, part)] => part.clone(),
        ranges => {
            let (below, above) = ranges.split_at(ranges.len() / 2);
            let (pivot, below, above) = (above[0].0, search(below), search(above));
            let mut program = match u8::try_from(below.len()) {
                Ok(len) => vec![jump(JUMP_IF_AT_LEAST, pivot, len, 0)],
                // Too far for a jump with a condition.
                Err(_) => {
                    vec![jump(JUMP_IF_AT_LEAST, pivot, 0, 1), statement(JUMP, below.len() as u32)]
                }
            };
            program.extend(below);
            program.extend(above);
            program
        }
    }
}

/// What is done once the number is known.
fn part(number: u32, rule: &Rule) -> Result<BpfProgram, Error> {
    if rule.unless.is_empty() {
        return Ok(vec![refuse(rule.refusal)]);
    }
    let alternatives = rule
        .unless
        .iter()
        .map(|all| SeccompRule::new(all.iter().map(condition).collect::<Result<_, _>>()?))
        .collect::<Result<_, BackendError>>()?;
    let whole = seccompiler_program([(i64::from(number), alternatives)].into(), rule.refusal)?;
    // A program without rules is the check of the architecture and the final action. The rest needs no architecture:
    // arguments lie at the same place on all of ours, which are little-endian.
    let bare = seccompiler_program(BTreeMap::new(), rule.refusal)?;
    let (_, check) = bare.split_last().ok_or(Error::Prologue)?;
    whole.strip_prefix(check).map(<[_]>::to_vec).ok_or(Error::Prologue)
}

fn seccompiler_program(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    refusal: Refusal,
) -> Result<BpfProgram, BackendError> {
    let refuse = SeccompAction::Errno(refusal.errno);
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

fn condition(condition: &Condition) -> Result<SeccompCondition, BackendError> {
    let operator = match (condition.comparison, condition.mask) {
        (Comparison::Equal, u32::MAX) => SeccompCmpOp::Eq,
        (Comparison::Equal, mask) => SeccompCmpOp::MaskedEq(mask.into()),
        (Comparison::Different, _) => SeccompCmpOp::Ne,
    };
    SeccompCondition::new(condition.argument, SeccompCmpArgLen::Dword, operator, condition.value.into())
}

fn statement(code: u16, k: u32) -> Instruction {
    Instruction { code, jt: 0, jf: 0, k }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> Instruction {
    Instruction { code, jt, jf, k }
}

fn allow() -> Instruction {
    statement(RETURN, ALLOW)
}

fn refuse(refusal: Refusal) -> Instruction {
    statement(RETURN, ERRNO | refusal.errno)
}
