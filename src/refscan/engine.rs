//! The engines that look for needles, behind one seam: a set of needles chooses its engine when it is
//! built, and a [`Cursor`] is all that an engine carries from one chunk to the next.

use aho_corasick::automaton::{Automaton, StateID};
use aho_corasick::{Anchored, MatchKind, dfa::DFA, nfa::contiguous::NFA};

use super::{Found, PatternsError};

/// Up to this many bytes of needles a full table is built: it is twice as fast as the compact form, but
/// takes up to a kibibyte of memory for each byte of a needle.
const TABLE_MAX_BYTES: usize = 4 * 1024;

/// One way of looking for a set of distinct, non-empty needles.
pub(super) enum Engine {
    /// There are no needles.
    Nothing,
    /// An automaton with a full table.
    Table(DFA),
    /// An automaton in compact form.
    Compact(NFA),
}

/// Where an engine stands in a stream.
pub(super) enum Cursor {
    /// There is nothing to be looked for.
    Nowhere,
    /// The automaton's state.
    State(StateID),
}

impl Engine {
    /// Chooses and builds the engine for `needles`.
    pub(super) fn new(needles: &[&[u8]]) -> Result<Self, PatternsError> {
        let bytes = needles.iter().map(|needle| needle.len()).sum();
        let too_large = |_| PatternsError::TooLarge { count: needles.len(), bytes };
        // `Standard` reports a needle inside of another one; the other kinds would not.
        let kind = MatchKind::Standard;
        Ok(match bytes {
            0 => Self::Nothing,
            1..=TABLE_MAX_BYTES => {
                let mut builder = DFA::builder();
                builder.match_kind(kind).prefilter(false);
                Self::Table(builder.build(needles).map_err(too_large)?)
            }
            _ => {
                let mut builder = NFA::builder();
                builder.match_kind(kind).prefilter(false);
                Self::Compact(builder.build(needles).map_err(too_large)?)
            }
        })
    }

    /// The beginning of a stream.
    pub(super) fn start(&self) -> Cursor {
        let state = match self {
            Self::Nothing => return Cursor::Nowhere,
            Self::Table(automaton) => automaton.start_state(Anchored::No),
            Self::Compact(automaton) => automaton.start_state(Anchored::No),
        };
        Cursor::State(state.expect("automata are built for unanchored searches"))
    }

    /// Notes the needles that end in `chunk`.
    pub(super) fn feed(&self, cursor: &mut Cursor, chunk: &[u8], found: &Found) {
        match (self, cursor) {
            (Self::Table(automaton), Cursor::State(state)) => *state = walk(automaton, *state, chunk, found),
            (Self::Compact(automaton), Cursor::State(state)) => {
                *state = walk(automaton, *state, chunk, found)
            }
            (Self::Nothing, _) | (_, Cursor::Nowhere) => {}
        }
    }
}

/// Steps through `chunk` and yields the state behind it.
fn walk(automaton: &impl Automaton, mut state: StateID, chunk: &[u8], found: &Found) -> StateID {
    for &byte in chunk {
        state = automaton.next_state(Anchored::No, state, byte);
        if automaton.is_special(state) && automaton.is_match(state) && note(automaton, state, found) {
            break;
        }
    }
    state
}

/// Notes the needles that end in `state`; true once all needles are found.
///
/// The first needle of a state is its longest and all others are ends of it. So they were noted when the
/// first was: without this, needles that nest a thousand deep would cost a thousand steps a byte.
fn note(automaton: &impl Automaton, state: StateID, found: &Found) -> bool {
    if !found.contains(automaton.match_pattern(state, 0).as_usize()) {
        for index in 0..automaton.match_len(state) {
            found.insert(automaton.match_pattern(state, index).as_usize());
        }
    }
    found.all()
}
