//! Reads `policy/`: what is refused, and which numbers system calls have. Its README explains the format.
//!
//! Used by the build script, and by the tests.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;

/// What is wrong with a file of `policy/`.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The line, from 1.
    line: usize,
    what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.what)
    }
}

/// An error number that builds are told, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What it is called.
    pub name: &'static str,
    /// Its number: the same on all ABIs of the table.
    pub errno: u32,
}

impl Refusal {
    /// What is told of calls that the kernel, or the table, does not know.
    pub const UNKNOWN_CALL: Refusal = Refusal { name: "ENOSYS", errno: 38 };

    const ALL: [Refusal; 4] = [
        Refusal { name: "EPERM", errno: 1 },
        Refusal::UNKNOWN_CALL,
        Refusal { name: "EOPNOTSUPP", errno: 95 },
        Refusal { name: "EAFNOSUPPORT", errno: 97 },
    ];

    fn named(name: &str) -> Option<Refusal> {
        Self::ALL.into_iter().find(|refusal| refusal.name == name)
    }
}

/// What is done about one system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What a build is told.
    pub refusal: Refusal,
    /// The call is let through where all conditions of any of these hold. Empty: never.
    pub unless: Vec<Vec<Condition>>,
}

/// A condition on the lower half of one argument. The kernel takes no more of any argument that the rules look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// Which argument, from 0.
    pub argument: u8,
    /// The bits that are looked at.
    pub mask: u32,
    /// How they compare.
    pub comparison: Comparison,
    /// To what.
    pub value: u32,
}

/// How the two sides of a condition compare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    /// `==`
    Equal,
    /// `!=`
    Different,
}

/// A profile: rules by the names of calls.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// The rules.
    pub rules: BTreeMap<String, Rule>,
}

impl Policy {
    /// Reads a profile. `include NAME` is looked up in `others`.
    pub fn parse(text: &str, others: &[(&str, &Policy)]) -> Result<Policy, Mistake> {
        let mut policy = Policy::default();
        for (line, words) in statements(text) {
            let mistake = |what: String| Mistake { line, what };
            if let ["include", name] = words[..] {
                let (_, other) = others
                    .iter()
                    .find(|(other, _)| *other == name)
                    .ok_or_else(|| mistake(format!("there is no policy {name}")))?;
                policy.rules.extend(other.rules.clone());
                continue;
            }
            let (calls, rule) = statement(&words).map_err(mistake)?;
            for call in calls {
                if policy.rules.insert((*call).to_owned(), rule.clone()).is_some() {
                    return Err(mistake(format!("{call} has a rule already")));
                }
            }
        }
        Ok(policy)
    }
}

/// The statements of a text with their first lines: comments are cut off, and a line that starts with a space goes on
/// with the one before.
fn statements(text: &str) -> Vec<(usize, Vec<&str>)> {
    let mut statements: Vec<(usize, Vec<&str>)> = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        let code = text.split('#').next().unwrap_or_default();
        let words = code.split_whitespace();
        match statements.last_mut() {
            Some((_, statement)) if code.starts_with(char::is_whitespace) => statement.extend(words),
            _ => statements.push((line, words.collect())),
        }
    }
    statements.retain(|(_, words)| !words.is_empty());
    statements
}

/// `ERRNO CALL... [unless CONDITION [and CONDITION]... [or ...]]`
fn statement<'a>(words: &'a [&'a str]) -> Result<(&'a [&'a str], Rule), String> {
    let Some((errno, rest)) = words.split_first() else { return Err("nothing is said".into()) };
    let refusal = Refusal::named(errno).ok_or_else(|| format!("{errno} is no error number known here"))?;
    let (calls, unless) = match rest.iter().position(|word| *word == "unless") {
        None => (rest, Vec::new()),
        Some(at) => {
            let alternatives = rest[at + 1..].split(|word| *word == "or");
            let all = |words: &[&str]| words.split(|word| *word == "and").map(condition).collect();
            (&rest[..at], alternatives.map(all).collect::<Result<_, String>>()?)
        }
    };
    match calls {
        [] => Err("no call is named".into()),
        calls => Ok((calls, Rule { refusal, unless })),
    }
}

/// `argN [& MASK] ==|!= VALUE`
fn condition(words: &[&str]) -> Result<Condition, String> {
    let (argument, mask, comparison, value) = match words {
        [argument, "&", mask, comparison, value] => (argument, number(mask)?, comparison, value),
        [argument, comparison, value] => (argument, u32::MAX, comparison, value),
        _ => return Err(format!("\"{}\" is no condition", words.join(" "))),
    };
    let argument = argument.strip_prefix("arg").and_then(|digit| digit.parse().ok()).filter(|n| *n < 6);
    let comparison = match *comparison {
        "==" => Comparison::Equal,
        "!=" if mask == u32::MAX => Comparison::Different,
        other => return Err(format!("{other} can't be asked here")),
    };
    let value = number(value)?;
    let argument = argument.ok_or_else(|| format!("\"{}\" names no argument", words.join(" ")))?;
    Ok(Condition { argument, mask, comparison, value })
}

/// A number as C writes it.
fn number(text: &str) -> Result<u32, String> {
    let parsed = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
        (Some(hex), _) => u32::from_str_radix(hex, 16),
        (None, Some(octal)) if !octal.is_empty() => u32::from_str_radix(octal, 8),
        _ => text.parse(),
    };
    parsed.map_err(|_| format!("{text} is no number of 32 bits"))
}

/// A way into the kernel: a set of system call numbers. Its value is its column in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// 64-bit programs of x86.
    X86_64,
    /// 32-bit programs of x86, and `int 0x80`.
    I386,
    /// 64-bit programs of ARM.
    Aarch64,
    /// 32-bit programs of ARM.
    Arm,
}

impl Abi {
    /// All of the table, in the order of its columns.
    pub const ALL: [Abi; 4] = [Abi::X86_64, Abi::I386, Abi::Aarch64, Abi::Arm];

    /// What the kernel calls it in `seccomp_data.arch` (linux/audit.h).
    pub fn audit_arch(self) -> u32 {
        match self {
            Abi::X86_64 => 0xc000_003e,
            Abi::I386 => 0x4000_0003,
            Abi::Aarch64 => 0xc000_00b7,
            Abi::Arm => 0x4000_0028,
        }
    }
}

/// The numbers of system calls.
#[derive(Debug, Default)]
pub struct Table {
    /// By name, a number for each ABI that has the call.
    pub calls: BTreeMap<String, [Option<u32>; 4]>,
    /// For each ABI, the numbers that Linux has given away, ascending.
    pub assigned: [Vec<RangeInclusive<u32>>; 4],
}

impl Table {
    /// Reads the table.
    pub fn parse(text: &str) -> Result<Table, Mistake> {
        let mut table = Table::default();
        for (line, words) in statements(text) {
            let mistake = |what: String| Mistake { line, what };
            let [name, columns @ ..] = &words[..] else { continue };
            let columns: [&str; 4] = columns
                .try_into()
                .map_err(|_| mistake(format!("{name} needs {} columns", Abi::ALL.len())))?;
            match *name {
                "assigned" => {
                    for (ranges, text) in table.assigned.iter_mut().zip(columns) {
                        *ranges = text.split(',').map(range).collect::<Result<_, _>>().map_err(mistake)?;
                    }
                }
                name => {
                    let mut numbers = [None; 4];
                    for (to, text) in numbers.iter_mut().zip(columns) {
                        *to = match text {
                            "-" => None,
                            text => Some(number(text).map_err(mistake)?),
                        };
                    }
                    if table.calls.insert(name.to_owned(), numbers).is_some() {
                        return Err(mistake(format!("{name} is there twice")));
                    }
                }
            }
        }
        Ok(table)
    }

    /// The number of a call on an ABI, if it has one there.
    pub fn number(&self, call: &str, abi: Abi) -> Option<u32> {
        self.calls.get(call).and_then(|numbers| numbers[abi as usize])
    }
}

fn range(text: &str) -> Result<RangeInclusive<u32>, String> {
    let (first, last) = text.split_once('-').ok_or_else(|| format!("{text} is no range"))?;
    Ok(number(first)?..=number(last)?)
}
