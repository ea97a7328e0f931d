//! From a policy to the program that the kernel runs before every system call.
//!
//! ```text
//! which ABI? ─▶ which number? ─▶ allowed, refused, or: look at the arguments
//! (dispatch)    (binary search)  (seccompiler's part)
//! ```
//!
//! seccompiler makes programs for one ABI with one refusal, and looks for a number one by one. What a sandbox pays for is
//! the length of its program, which the kernel compiles each time it gets it, and the steps to each number: the kernel
//! runs a new program once for every number, to know which are always allowed and never need it again. So seccompiler
//! makes the conditions on arguments, each once for all calls and ABIs that have them, and the search is ours.
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
    let mut program = Backwards::default();
    let mut otherwise = program.part(&vec![refuse(Refusal::UNKNOWN_CALL)]);
    for abi in abis.iter().rev() {
        let ranges = ranges_of(policy, table, *abi)?;
        program.search(&ranges);
        let found = program.push(LOAD_WORD, OFFSET_OF_NUMBER);
        otherwise = program.branch(JUMP_IF_EQUAL, abi.audit_arch(), found, otherwise);
    }
    program.push(LOAD_WORD, OFFSET_OF_ARCH);
    program.finish()
}

/// What is done about each number of an ABI: from the one that is named to the next.
fn ranges_of(policy: &Policy, table: &Table, abi: Abi) -> Result<Vec<(u32, BpfProgram)>, Error> {
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
            insert(&mut ranges, number, part(rule)?);
        }
    }
    // A tracer has taken the call's place: the kernel will do nothing.
    insert(&mut ranges, u32::MAX, vec![allow()]);
    let mut ranges: Vec<(u32, BpfProgram)> = ranges.into_iter().collect();
    ranges.dedup_by(|next, range| next.1 == range.1);
    Ok(ranges)
}

/// Cuts one number out of the range that holds it.
fn insert(ranges: &mut BTreeMap<u32, BpfProgram>, number: u32, part: BpfProgram) {
    let around = ranges.range(..=number).next_back().map(|(_, around)| around.clone());
    if let (Some(next), Some(around)) = (number.checked_add(1), around) {
        ranges.entry(next).or_insert(around);
    }
    ranges.insert(number, part);
}

/// A program in the making, from its end to its beginning: jumps only go forward, so what they lead to is there already.
#[derive(Default)]
struct Backwards {
    instructions: BpfProgram,
    /// Where the last copy of each part, or a jump to it, begins.
    parts: Vec<(BpfProgram, Place)>,
}

/// An instruction, by how many there are from it to the end.
#[derive(Clone, Copy)]
struct Place(usize);

impl Backwards {
    /// How far a jump with a condition is let go. It could go 255, but both of its sides may get a longer jump before it.
    const REACH: usize = 253;

    fn push(&mut self, code: u16, k: u32) -> Place {
        self.push_instruction(statement(code, k))
    }

    fn push_instruction(&mut self, instruction: Instruction) -> Place {
        self.instructions.push(instruction);
        Place(self.instructions.len())
    }

    /// How far it is from the next instruction to `place`.
    fn distance(&self, place: Place) -> usize {
        self.instructions.len() - place.0
    }

    fn jump_to(&mut self, place: Place) -> Place {
        self.push(JUMP, self.distance(place) as u32)
    }

    /// The place of a part: the one that is there, or one that is nearer.
    fn part(&mut self, part: &BpfProgram) -> Place {
        let known =
            self.parts.iter().position(|(known, _)| known == part).map(|at| self.parts.swap_remove(at));
        let place = match known {
            Some((_, place)) if self.distance(place) <= Self::REACH / 2 => place,
            Some((_, place)) if part.len() > 1 => self.jump_to(place),
            _ => {
                self.instructions.extend(part.iter().rev().cloned());
                Place(self.instructions.len())
            }
        };
        self.parts.push((part.clone(), place));
        place
    }

    /// Finds the range of the number that is loaded, and goes on with its part.
    fn search(&mut self, ranges: &[(u32, BpfProgram)]) -> Place {
        match ranges {
            [(_, part)] => self.part(part),
            ranges => {
                let (below, above) = ranges.split_at(ranges.len() / 2);
                let pivot = above[0].0;
                let above = self.search(above);
                let below = self.search(below);
                self.branch(JUMP_IF_AT_LEAST, pivot, above, below)
            }
        }
    }

    fn branch(&mut self, code: u16, k: u32, yes: Place, no: Place) -> Place {
        let mut near = |place| match self.distance(place) {
            ..=Self::REACH => place,
            _ => self.jump_to(place),
        };
        let (yes, no) = (near(yes), near(no));
        let [jt, jf] = [yes, no].map(|place| self.distance(place) as u8);
        self.push_instruction(Instruction { code, jt, jf, k })
    }

    fn finish(mut self) -> Result<BpfProgram, Error> {
        self.instructions.reverse();
        match self.instructions.len() {
            len if len > MAX_LEN => Err(Error::TooLong(len)),
            _ => Ok(self.instructions),
        }
    }
}

/// What is done once the number is known.
fn part(rule: &Rule) -> Result<BpfProgram, Error> {
    /// Stands for the call, which is known then.
    const NUMBER: u32 = 0;
    if rule.unless.is_empty() {
        return Ok(vec![refuse(rule.refusal)]);
    }
    let alternatives = rule
        .unless
        .iter()
        .map(|all| SeccompRule::new(all.iter().map(condition).collect::<Result<_, _>>()?))
        .collect::<Result<_, BackendError>>()?;
    let whole = seccompiler_program([(NUMBER.into(), alternatives)].into(), rule.refusal)?;
    // A program without rules is the check of the architecture and the final action. The rest needs no architecture:
    // arguments lie at the same place on all of ours, which are little-endian.
    let bare = seccompiler_program(BTreeMap::new(), rule.refusal)?;
    let (end, check) = bare.split_last().ok_or(Error::Prologue)?;
    match whole.strip_prefix(check).ok_or(Error::Prologue)? {
        // The search for the number, the rules, their end, and the end of the search.
        [load, is_it, rules @ .., rules_end, search_end]
            if *load == statement(LOAD_WORD, OFFSET_OF_NUMBER)
                && (is_it.code, is_it.k, is_it.jt) == (JUMP_IF_EQUAL, NUMBER, 0)
                && (rules_end, search_end) == (end, end) =>
        {
            Ok([rules, std::slice::from_ref(rules_end)].concat())
        }
        _ => Err(Error::Prologue),
    }
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

fn allow() -> Instruction {
    statement(RETURN, ALLOW)
}

fn refuse(refusal: Refusal) -> Instruction {
    statement(RETURN, ERRNO | refusal.errno)
}
