use proptest::prelude::*;
use proptest::sample::Index;

use super::engine::Engine;
use super::*;

/// What a search for each needle on its own finds.
fn naive(needles: &[Vec<u8>], streams: &[Vec<u8>]) -> Vec<u64> {
    let occurs = |needle: &Vec<u8>| {
        streams.iter().any(|stream| stream.windows(needle.len()).any(|window| window == &needle[..]))
    };
    (0..needles.len() as u64).filter(|index| occurs(&needles[*index as usize])).collect()
}

/// What the scanner finds when each stream is cut after every `cuts` bytes, going round.
fn scanned(patterns: &Patterns, streams: &[Vec<u8>], cuts: &[usize]) -> Vec<u64> {
    let scanner = Scanner::new(patterns);
    let mut cuts = cuts.iter().cycle();
    for stream in streams {
        let mut open = scanner.stream();
        let mut rest = &stream[..];
        while !rest.is_empty() {
            let (chunk, behind) = rest.split_at(rest.len().min(*cuts.next().unwrap_or(&usize::MAX)));
            open.feed(chunk);
            rest = behind;
        }
    }
    scanner.found()
}

/// The same needles with every engine that takes them.
fn every_engine(needles: &[Vec<u8>]) -> Vec<(&'static str, Patterns)> {
    let chosen = Patterns::new(needles).unwrap();
    let mut distinct: Vec<&[u8]> = Vec::new();
    for needle in needles {
        if !distinct.contains(&&needle[..]) {
            distinct.push(needle);
        }
    }
    let mut all = vec![("chosen", chosen.clone())];
    if !distinct.is_empty() {
        let mut with = |name, engine| {
            all.push((name, Patterns(Arc::new(Inner { engine, indices: chosen.0.indices.clone() }))));
        };
        with("table", Engine::Table(aho_corasick::dfa::DFA::new(&distinct).unwrap()));
        with("compact", Engine::Compact(aho_corasick::nfa::contiguous::NFA::new(&distinct).unwrap()));
    }
    all
}

#[test]
fn named_cases() {
    let nested: Vec<Vec<u8>> = (1..200).map(|len| vec![b'a'; len]).collect();
    let nested: Vec<&[u8]> = nested.iter().map(Vec::as_slice).collect();
    let all_bytes: Vec<u8> = (0..=255).collect();
    let long = [b"x".repeat(5000), b"y".repeat(5000)].concat();
    type Case<'a> = (&'a str, &'a [&'a [u8]], &'a [&'a [u8]], &'a [u64]);
    let mut deep = b"bb".to_vec();
    deep.extend(b"a".repeat(150));
    let cases: &[Case] = &[
        ("no needles", &[], &[b"anything"], &[]),
        ("no data", &[b"a"], &[b""], &[]),
        ("one byte", &[b"a"], &[b"bab"], &[0]),
        ("at the beginning", &[b"abc"], &[b"abcd"], &[0]),
        ("at the end", &[b"abc"], &[b"xabc"], &[0]),
        ("the whole", &[b"abc"], &[b"abc"], &[0]),
        ("longer than the data", &[b"abcd"], &[b"abc"], &[]),
        ("overlapping", &[b"abc", b"bcd", b"cde"], &[b"abcde"], &[0, 1, 2]),
        ("nested in the middle", &[b"abcde", b"c"], &[b"abcde"], &[0, 1]),
        ("nested at the front", &[b"abc", b"ab"], &[b"xabx"], &[1]),
        ("nested at the end", &[b"xyabc", b"bc", b"c"], &[b"xyabc"], &[0, 1, 2]),
        ("only the inner one", &[b"xyabc", b"bc"], &[b"yabc"], &[1]),
        ("inside of a failed match", &[b"abcd", b"bcx"], &[b"abcx"], &[1]),
        ("after a false start", &[b"aab"], &[b"aaab"], &[0]),
        ("duplicates", &[b"a", b"b", b"a", b"c", b"a"], &[b"xa"], &[0, 2, 4]),
        ("duplicates ascend", &[b"b", b"a", b"b", b"a"], &[b"ab"], &[0, 1, 2, 3]),
        ("zeros", &[b"\0\0\0"], &[b"\0\0x\0\0\0"], &[0]),
        ("not valid as text", &[b"\xff\xfe", b"\xc3"], &[b"a\xff\xfeb"], &[0]),
        ("every byte", &[&all_bytes], &[&all_bytes], &[0]),
        ("case matters", &[b"abc"], &[b"ABC"], &[]),
        ("not across streams", &[b"abc"], &[b"ab", b"c"], &[]),
        ("in any of the streams", &[b"ab", b"cd"], &[b"cd", b"", b"ab"], &[0, 1]),
        ("longer than a chunk", &[&long], &[&long], &[0]),
        ("many nested", &nested, &[&deep], &(0..150).collect::<Vec<u64>>()),
    ];
    for (name, needles, streams, expected) in cases {
        let needles: Vec<Vec<u8>> = needles.iter().map(|needle| needle.to_vec()).collect();
        let streams: Vec<Vec<u8>> = streams.iter().map(|stream| stream.to_vec()).collect();
        assert_eq!(naive(&needles, &streams), *expected, "{name}, naive");
        for (engine, patterns) in every_engine(&needles) {
            for cuts in [&[1][..], &[2], &[3, 1], &[7], &[4096], &[usize::MAX]] {
                assert_eq!(
                    scanned(&patterns, &streams, cuts),
                    *expected,
                    "{name}, {engine}, chunks of {cuts:?}"
                );
            }
        }
    }
}

#[test]
fn an_empty_needle_is_refused_with_its_index() {
    let refused = Patterns::new(&["a", "", "b", ""]).unwrap_err();
    assert_eq!(refused, PatternsError::Empty { index: 1 });
    assert_eq!(refused.to_string(), "needle 1 is empty");
}

#[test]
fn the_size_of_the_set_chooses_the_engine() {
    let of = |count: usize| {
        let needles: Vec<String> = (0..count).map(|index| format!("{index:032}")).collect();
        Patterns::new(&needles).unwrap()
    };
    assert!(matches!(of(0).0.engine, Engine::Nothing));
    assert!(matches!(of(64).0.engine, Engine::Table(_)));
    assert!(matches!(of(1000).0.engine, Engine::Compact(_)));
}

#[test]
fn threads_share_a_scanner() {
    let needles: Vec<String> = (0..400).map(|index| format!("<{index}>")).collect();
    let scanner = Scanner::new(&Patterns::new(&needles).unwrap());
    std::thread::scope(|scope| {
        for part in needles.chunks(100) {
            let scanner = &scanner;
            scope.spawn(move || part[1..].iter().for_each(|needle| scanner.scan(needle.as_bytes())));
        }
    });
    let expected: Vec<u64> = (0..400).filter(|index| index % 100 != 0).collect();
    assert_eq!(scanner.found(), expected);
    assert!(!scanner.found.all());
    (0..4).for_each(|part| scanner.scan(needles[part * 100].as_bytes()));
    assert!(scanner.found.all());
    assert_eq!(scanner.found().len(), 400);
}

/// Bytes of a small alphabet, so that needles occur, overlap and nest.
fn bytes(max: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(prop_oneof![4 => b'a'..=b'c', 1 => any::<u8>()], 0..max)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn finds_what_the_naive_scan_finds(
        mut needles in prop::collection::vec(bytes(9), 0..40),
        streams in prop::collection::vec(bytes(200), 0..4),
        excerpts in prop::collection::vec((any::<Index>(), any::<Index>(), 1usize..40), 0..8),
        cuts in prop::collection::vec(1usize..20, 1..6),
    ) {
        for (stream, start, len) in excerpts {
            let Some(stream) = streams.get(stream.index(streams.len().max(1))) else { continue };
            let rest = &stream[start.index(stream.len() + 1)..];
            needles.push(rest[..len.min(rest.len())].to_vec());
        }
        needles.retain(|needle| !needle.is_empty());
        let expected = naive(&needles, &streams);
        for (engine, patterns) in every_engine(&needles) {
            prop_assert_eq!(scanned(&patterns, &streams, &cuts), &expected[..], "{}", engine);
        }
    }
}
