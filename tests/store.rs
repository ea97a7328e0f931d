//! `cofferdam store`: trees go in and come back as they were.

use std::os::unix::fs::PermissionsExt;
use std::process::ExitCode;

mod support;

use nix::sys::signal::Signal;
use support::case::{self, Ran, Running, finish};
use support::daemon::Daemon;
use support::{Case, Mode};

/// The digests of the design's three directories, and of no bytes at all.
const EMPTY: &str = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
const KEEP: &str = "8b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e";
const TREE: &str = "fb8c6e81db869c486d76733de6593944cfe2a311d452e478ec7e5180d77a0617";

fn main() -> ExitCode {
    let mut trials = support::in_own_mode(named![
        known_digests,
        bad_arguments,
        what_cannot_be_stored,
        added_files_are_counted,
        progress_is_shown_on_a_terminal_alone,
        listings,
        places_below_a_digest,
        contents_on_standard_output,
        archives,
        hostile_archives,
        many_files,
        mount_refusals,
        damage_is_found_and_removed,
        kept_to_a_size,
        what_a_daemon_has_is_its_own,
        a_daemon_keeps_its_store_to_a_size,
    ]);
    trials.extend(support::in_every_mode(named![
        there_and_back,
        there_and_back_over_the_wire,
        mounted_for_a_command,
        mounted_for_a_command_from_a_daemon,
    ]));
    trials.extend([Mode::Root].map(|mode| support::in_mode("mounted_for_all", mode, mounted_for_all)));
    support::run(trials)
}

fn store(case: &Case, args: &[&str], place: &[&str]) -> Ran {
    let mut command = case.cofferdam(["store"]);
    command.args(args).args(place);
    finish(command)
}

fn known_digests(case: &Case) {
    case.write("keep/.keep", "");
    tree(case, "tree");
    case.make_dir("empty");
    case.write("nothing", "");
    let table = [("keep", KEEP), ("tree", TREE), ("empty", EMPTY), ("nothing", EMPTY)];
    for (path, digest) in table {
        store(case, &["add", path], &["--state-dir", "state"]).code(0).says(&format!("{digest}\n"));
    }
}

fn tree(case: &Case, name: &str) {
    case.write(&format!("{name}/bin/.keep"), "");
    case::set_mode(&case.write(&format!("{name}/hello"), "hello world\n"), 0o755);
    case.link(&format!("{name}/link"), "bin/.keep");
}

/// Where nothing is wrong, what is flipped is found, and what is removed can be stored again.
fn damage_is_found_and_removed(case: &Case) {
    let place = ["--state-dir", "state"];
    tree(case, "tree");
    store(case, &["add", "tree"], &place).code(0);
    store(case, &["verify"], &place).code(0).says("").complains("2 blobs").complains("2 directories");
    let pack = case.path("state/store/packs/00000000");
    let mut bytes = std::fs::read(&pack).unwrap();
    let at = bytes.windows(5).position(|window| window == b"world").unwrap();
    bytes[at] ^= 1;
    std::fs::write(&pack, &bytes).unwrap();
    let hello = blake3::hash(b"hello world\n").to_hex();
    let damaged = format!("the blob {hello} is damaged\n");
    let missing = format!("the blob {hello} is missing; the directory {TREE} names it\n");
    store(case, &["verify"], &place).code(1).says(&format!("{damaged}{missing}"));
    store(case, &["cat", &format!("{TREE}/hello")], &place).code(125).says("").complains(&hello);
    std::fs::write(&pack, &bytes).unwrap();
    store(case, &["verify", "--repair"], &place).code(1);
    store(case, &["verify"], &place).code(1).says(&missing);
    store(case, &["add", "tree"], &place).code(0);
    store(case, &["verify"], &place).code(0).says("");
}

/// What is removed is gone, what is pinned stays, and what is young stays whatever the size.
fn kept_to_a_size(case: &Case) {
    let place = ["--state-dir", "state"];
    tree(case, "tree");
    store(case, &["add", "tree"], &place).code(0);
    case.write("other", "x".repeat(200_000));
    let other = store(case, &["add", "other"], &place).code(0).out();
    store(case, &["gc"], &place).code(125);
    store(case, &["gc", "--size", "0"], &place).code(0).complains("younger than ten minutes");
    store(case, &["get", TREE, "young"], &place).code(0);

    store(case, &["pin", TREE], &place).code(0);
    store(case, &["pin", TREE], &place).code(0).complains("pinned already");
    store(case, &["pin", &"0".repeat(64)], &place).code(125).complains("neither");
    let stat = store(case, &["stat", "--json"], &place).code(0).out();
    let stat: serde_json::Value = serde_json::from_str(&stat).unwrap();
    assert_eq!((&stat["pins"][0]["digest"], &stat["large_blobs"]), (&TREE.into(), &1.into()), "{stat}");
    assert!(store(case, &["stat"], &place).code(0).out().contains(&format!("pinned: directory {TREE}")));

    // As if it had been there for long.
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(100_000);
    for file in [
        "state/store/packs/00000000".to_owned(),
        format!("state/store/blobs/{}/{}", &other[..2], other.trim()),
    ] {
        std::fs::File::open(case.path(&file)).unwrap().set_modified(long_ago).unwrap();
    }
    store(case, &["gc", "--size", "0"], &place).code(0).complains("removed 1 blobs");
    store(case, &["get", other.trim(), "gone"], &place).code(125).complains("neither");
    store(case, &["get", TREE, "pinned"], &place).code(0);
    store(case, &["unpin", TREE], &place).code(0);
    store(case, &["unpin", TREE], &place).code(125).complains("is not pinned");
    store(case, &["verify"], &place).code(0);
}

fn a_daemon_keeps_its_store_to_a_size(case: &Case) {
    let old = |blob: &str| {
        let file = case.path(&format!("state/store/blobs/{}/{blob}", &blob[..2]));
        let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(100_000);
        std::fs::File::open(file).unwrap().set_modified(long_ago).unwrap();
    };
    let add = |name: &str| {
        case.write(name, name.repeat(100_000));
        store(case, &["add", name], &["--state-dir", "state"]).code(0).out().trim().to_owned()
    };
    let (gone, kept) = (add("gone"), add("kept"));
    old(&gone);
    let daemon = Daemon::start(case, &["--no-builds", "--store-size", "500K"]);
    support::leftovers::until("the old blob's end", || {
        let there = store(case, &["cat", &gone], &["--to", &daemon.address()]);
        !there.status.success()
    });
    store(case, &["cat", &kept], &["--to", &daemon.address()]).code(0);
}

fn what_a_daemon_has_is_its_own(case: &Case) {
    for command in [&["verify"][..], &["gc", "--size", "1G"], &["stat"], &["pin", TREE], &["unpin", TREE]] {
        store(case, command, &["--to", "unix:none"]).code(125).complains("where the store lies");
    }
}

fn comes_back(case: &Case, place: &[&str]) {
    tree(case, "tree");
    store(case, &["add", "tree"], place).code(0).says(&format!("{TREE}\n"));
    let listing = store(case, &["ls", TREE], place).code(0).out();
    for name in ["bin", "hello", "link"] {
        assert!(listing.contains(name), "no {name} in {listing}");
    }
    store(case, &["get", TREE, "back"], place).code(0);
    let same = case.program("diff").args(["-r", "--no-dereference", "tree", "back"]).status().unwrap();
    assert!(same.success());
    let executable = |path| std::fs::metadata(case.path(path)).unwrap().permissions().mode() & 0o100 != 0;
    assert!(executable("back/hello") && !executable("back/bin/.keep"));
    // Once more, and nothing is lost by what is already there.
    store(case, &["add", "tree"], place).code(0).says(&format!("{TREE}\n"));
    store(case, &["get", TREE, "back"], place).code(125).complains("back");
    store(case, &["get", &"0".repeat(64), "none"], place).code(125).complains("0000");
    assert!(!case.path("none").exists());
}

fn there_and_back(case: &Case) {
    comes_back(case, &["--state-dir", "state"]);
}

fn there_and_back_over_the_wire(case: &Case) {
    let daemon = Daemon::start(case, &["--no-builds"]);
    comes_back(case, &["--to", &daemon.address()]);
    // And a file larger than any message.
    let big: Vec<u8> = (0..9_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    case.write("big", &big);
    let digest = store(case, &["add", "big"], &["--to", &daemon.address()]).code(0).out();
    assert_eq!(digest.trim(), blake3::hash(&big).to_hex().as_str());
    store(case, &["get", digest.trim(), "big-back"], &["--to", &daemon.address()]).code(0);
    assert!(case.read("big-back") == big);
}

fn bad_arguments(case: &Case) {
    case.write("file", "");
    let long = "0".repeat(63);
    let table: [(&[&str], &str); 10] = [
        (&["add"], "PATH"),
        (&["add", "no/such"], "no/such"),
        (&["cat", "abc/def"], "64 hexadecimal"),
        (&["tar", &format!("{EMPTY}/../x")], "names the directory itself or its parent"),
        (&["untar", "no/such"], "no/such"),
        (&["get", "xyz", "dest"], "xyz"),
        (&["get", &long, "dest"], &long),
        (&["ls", EMPTY, "--no-such-flag"], "--no-such-flag"),
        (&["ls", KEEP, "--to", "nonsense"], "nonsense"),
        (&["frobnicate"], "frobnicate"),
    ];
    for (args, named) in table {
        let ran = store(case, args, &["--state-dir", "state"]).code(125).says("");
        assert!(ran.err().contains(named) && !ran.err().contains("panicked"), "{args:?}; {ran}");
    }
}

fn what_cannot_be_stored(case: &Case) {
    let made = case.program("mkfifo").arg(case.make_dir("dir").join("the-pipe")).status().unwrap();
    assert!(made.success());
    store(case, &["add", "dir"], &["--state-dir", "state"]).code(125).says("").complains("dir/the-pipe");
}

/// A table row of `ls -l` without its digest.
fn row(line: &str) -> (&str, &str, String) {
    let mut words = line.split_whitespace();
    let (kind, size, _digest) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
    (kind, size, words.collect::<Vec<_>>().join(" "))
}

fn added_files_are_counted(case: &Case) {
    let place = ["--state-dir", "state"];
    tree(case, "tree");
    let first = store(case, &["add", "tree"], &place).code(0).err();
    assert_eq!(first, "2 files, 12 bytes; new: 2, 12 bytes; known: 0, 0 bytes\n");
    case.write("tree/third", vec![b'x'; 3000]);
    let second = store(case, &["add", "tree", "tree/hello"], &place).code(0);
    assert_eq!(second.err(), "4 files, 2.9 KiB; new: 1, 2.9 KiB; known: 3, 24 bytes\n");
    assert_eq!(second.out().lines().count(), 2, "a digest for each path");
    assert_eq!(store(case, &["add", "tree", "--quiet"], &place).code(0).err(), "");
    let told = store(case, &["add", "tree/bin", "tree/hello", "--json"], &place).code(0);
    let expected = serde_json::json!({
        "path": "tree/bin", "kind": "directory", "digest": KEEP,
        "files": 1, "bytes": 0, "new_files": 0, "new_bytes": 0,
    });
    assert_eq!(told.json()[0], expected);
    assert_eq!((&told.json()[1]["kind"], told.err().as_str()), (&"file".into(), ""));
    // What came before the one that failed is told of; it is in the store.
    let failed = store(case, &["add", "tree/bin", "no/such", "tree"], &place).code(125);
    failed.says(&format!("{KEEP}\n")).complains("no/such");
}

fn progress_is_shown_on_a_terminal_alone(case: &Case) {
    tree(case, "tree");
    let made = case.program("tar").args(["cf", "archive", "tree"]).status().unwrap();
    assert!(made.success());
    // An archive that comes in two parts takes long enough to be seen.
    let slowly = |options: &str| {
        let binary = support::binary().display();
        format!(
            "(head -c 2000 archive; sleep 1; tail -c +2001 archive) | {binary} store untar --state-dir state {options}"
        )
    };
    let on_a_terminal = |script: &str| {
        let mut command = case.program("script");
        command.args(["-qefc", script, "/dev/null"]);
        finish(command).code(0).out()
    };
    let shown = on_a_terminal(&slowly(""));
    assert!(shown.contains("\r\u{1b}[Kadding: "), "{shown:?}");
    let end = shown.rsplit("\u{1b}[K").next().unwrap();
    assert!(
        end.contains("2 files, 12 bytes; new: 2, 12 bytes"),
        "the line goes before the summary: {shown:?}"
    );
    let quiet = on_a_terminal(&slowly("--quiet"));
    assert!(!quiet.contains('\u{1b}') && quiet.trim().len() == 64, "{quiet:?}");
    let mut piped = case.program("sh");
    piped.args(["-c", &slowly("")]);
    let piped = finish(piped).code(0);
    assert!(!piped.err().contains('\r'), "{piped}");
}

fn listings(case: &Case) {
    let place = ["--state-dir", "state"];
    tree(case, "tree");
    case.write("tree/bin/new\nline", vec![b'x'; 12_345]);
    let digest = store(case, &["add", "tree"], &place).code(0).out();
    let digest = digest.trim();
    store(case, &["ls", digest], &place).code(0).says("bin\nhello\nlink\n");
    store(case, &["ls", "-R", digest], &place).code(0).says("bin\nbin/.keep\nbin/new\\nline\nhello\nlink\n");
    let long = store(case, &["ls", "-lR", digest], &place).code(0).out();
    let rows: Vec<_> = long.lines().map(row).collect();
    let expected = [
        ("dir", "4", "bin"),
        ("file", "0", "bin/.keep"),
        ("file", "12345", "bin/new\\nline"),
        ("exec", "12", "hello"),
        ("link", "9", "link -> bin/.keep"),
    ];
    assert_eq!(rows, expected.map(|(kind, size, name)| (kind, size, name.to_owned())));
    // In columns: every name begins at the same place.
    let columns = |name: &str| long.lines().find_map(|line| line.find(name));
    assert!(columns(" bin/.keep") == columns(" hello") && columns(" hello").is_some(), "{long}");
    let shown = long.lines().find(|line| line.ends_with("hello")).unwrap();
    assert!(shown.contains(blake3::hash(b"hello world\n").to_hex().as_str()), "{shown}");
    // No bytes are a file's and a directory's, if the store has one.
    store(case, &["ls", EMPTY], &place).code(0).says(&format!("{EMPTY}\n"));
    case.make_dir("empty");
    store(case, &["add", "empty"], &place).code(0);
    store(case, &["ls", EMPTY], &place).code(0).says("");
    assert_eq!(row(&store(case, &["ls", "-l", &format!("{digest}/link")], &place).code(0).out()).0, "link");
}

fn places_below_a_digest(case: &Case) {
    let place = ["--state-dir", "state"];
    tree(case, "tree");
    store(case, &["add", "tree"], &place).code(0);
    let below = |path: &str| format!("{TREE}/{path}");
    store(case, &["get", &below("hello"), "hello"], &place).code(0).says("");
    assert_eq!(std::fs::metadata(case.path("hello")).unwrap().permissions().mode() & 0o100, 0o100);
    let hello = blake3::hash(b"hello world\n").to_hex();
    let counted = store(case, &["get", hello.as_str(), "plain"], &place).code(0).err();
    assert_eq!(counted, "1 file, 12 bytes\n");
    let mode = std::fs::metadata(case.path("plain")).unwrap().permissions().mode();
    assert_eq!(mode & 0o100, 0, "that is part of the directory");
    store(case, &["get", &below("link"), "link"], &place).code(0);
    assert_eq!(std::fs::read_link(case.path("link")).unwrap().to_str(), Some("bin/.keep"));
    store(case, &["ls", &below("bin//")], &place).code(0).says(".keep\n");
    for (path, reason) in [
        ("nowhere", format!("no nowhere in {TREE}")),
        ("hello/x", format!("{TREE}/hello is no directory")),
        ("link/x", format!("{TREE}/link is no directory")),
        ("bin/x\u{7f}", format!("no x\\x7f in {TREE}/bin")),
    ] {
        for command in ["ls", "cat", "tar"] {
            store(case, &[command, &below(path)], &place).code(125).says("").complains(&reason);
        }
    }
}

fn contents_on_standard_output(case: &Case) {
    let place = ["--state-dir", "state"];
    let contents: Vec<u8> = (0..700_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    case.write("dir/file", &contents);
    case.link("dir/link", "file");
    let digest = store(case, &["add", "dir"], &place).code(0).out();
    let digest = digest.trim();
    let blob = blake3::hash(&contents).to_hex();
    for what in [&format!("{digest}/file"), blob.as_str()] {
        let ran = store(case, &["cat", what], &place).code(0);
        assert!(ran.stdout == contents && ran.err().is_empty());
    }
    store(case, &["cat", digest], &place).code(125).says("").complains("is a directory");
    store(case, &["cat", &format!("{digest}/link")], &place)
        .code(125)
        .says("")
        .complains("is a symbolic link");
    // No bytes are those of the empty directory, too; here they are those of a file.
    case.write("nothing", "");
    case.make_dir("empty");
    store(case, &["add", "nothing", "empty"], &place).code(0);
    store(case, &["cat", EMPTY], &place).code(0).says("");
}

fn archives(case: &Case) {
    let place = ["--state-dir", "state"];
    tree(case, "tree");
    store(case, &["add", "tree"], &place).code(0);
    store(case, &["tar", TREE, "--output", "one.tar"], &place).code(0).says("");
    let archive = store(case, &["tar", TREE], &place).code(0).stdout;
    assert!(archive == case.read("one.tar"), "it is the same each time");
    case.make_dir("out");
    let unpacked = case.program("tar").args(["xf", "one.tar", "-C", "out"]).status().unwrap();
    assert!(unpacked.success());
    store(case, &["add", "out"], &place).code(0).says(&format!("{TREE}\n"));
    // And back, from a file, and from a program that writes in blocks of its own.
    let told = store(case, &["untar", "one.tar"], &["--state-dir", "other"]).code(0);
    assert_eq!(told.err(), "2 files, 12 bytes; new: 2, 12 bytes; known: 0, 0 bytes\n");
    told.says(&format!("{TREE}\n"));
    let script = "set -o pipefail; tar cf - -C tree . | \"$0\" store untar --state-dir third --json";
    let mut piped = case.program("bash");
    piped.args(["-c", script]).arg(support::binary());
    let told = finish(piped).code(0).json();
    assert_eq!((&told[0]["digest"], &told[0]["new_files"]), (&TREE.into(), &2.into()));
    // A file alone is called as in its directory.
    store(case, &["tar", &format!("{TREE}/hello"), "-o", "hello.tar"], &place).code(0);
    let listed = case.program("tar").args(["tf", "hello.tar"]).output().unwrap();
    assert_eq!(listed.stdout, b"hello\n");
    // What can't be made leaves nothing.
    store(case, &["tar", &"0".repeat(64), "-o", "none.tar"], &place).code(125);
    assert!(!case.path("none.tar").exists());
    store(case, &["tar", TREE, "-o", "/dev/full"], &place).code(125).complains("can't write the archive");
}

fn hostile_archives(case: &Case) {
    tree(case, "tree");
    let make = |name: &str, arguments: &[&str]| {
        let made = case.program("tar").args(["-cPf", name]).args(arguments).status().unwrap();
        assert!(made.success(), "{name}");
    };
    let pipe = case.program("mkfifo").arg(case.path("pipe")).status().unwrap();
    assert!(pipe.success());
    make("absolute", &["/etc/hostname"]);
    make("upwards", &["--transform=s,tree,../tree,", "tree"]);
    make("device", &["pipe"]);
    make("twice", &["tree/hello", "tree/hello"]);
    make("whole", &["tree"]);
    case.write("cut", &case.read("whole")[..512]);
    case.write("text", "no archive at all ".repeat(100));
    let table = [
        ("absolute", "\"/etc/hostname\" has an absolute path"),
        ("upwards", "\"../tree/\" has \"..\" in its path"),
        ("device", "\"pipe\" is a fifo"),
        ("twice", "\"tree/hello\" is a hard link to"),
        ("cut", "without the empty block"),
        ("text", "can't read the archive at its start"),
    ];
    for (name, reason) in table {
        let ran = store(case, &["untar", name], &["--state-dir", "state"]).code(125).says("");
        // GNU's tar makes the second of two a link to the first.
        let reason = if name == "twice" && !ran.err().contains(reason) { "stands twice" } else { reason };
        ran.complains(reason);
    }
}

fn many_files(case: &Case) {
    let place = ["--state-dir", "state"];
    // More than one thread takes, in directories of many sizes.
    for number in 0..900u32 {
        case.write(&format!("tree/{}/{}/{number}", number % 7, number % 31), number.to_string().repeat(9));
    }
    let added = store(case, &["add", "tree"], &place).code(0);
    assert!(added.err().starts_with("900 files, "), "{added}");
    store(case, &["get", added.out().trim(), "back"], &place).code(0);
    let same = case.program("diff").args(["-r", "tree", "back"]).status().unwrap();
    assert!(same.success());
}

fn mount_refusals(case: &Case) {
    let place = ["--state-dir", "state"];
    tree(case, "tree");
    case.make_dir("dir");
    store(case, &["add", "tree"], &place).code(0);
    let file = format!("{TREE}/hello");
    let table: [(&[&str], &str, i32); 4] = [
        (&["mount", TREE, "nowhere", "--", "true"], "nowhere", 125),
        (&["mount", &file, "dir", "--", "true"], "is no directory", 125),
        (&["mount", TREE, "dir", "--", "no-such-program"], "no-such-program", 127),
        (&["mount", TREE, "dir", "--", "./tree"], "./tree", 126),
    ];
    for (arguments, reason, code) in table {
        let mut command = case.cofferdam(["store", "--state-dir", "state"]);
        command.args(arguments);
        finish(command).code(code).complains(reason);
    }
}

/// What a command sees at `seen`, where the design's tree is mounted.
const LOOK: &str = "cat seen/hello && seen/../seen/bin/../hello 2>/dev/null; test -x seen/hello && \
    readlink seen/link && ls -A seen seen/bin && ! touch seen/new 2>/dev/null && (cd seen/bin && pwd -P | grep -o 'seen/bin$')";
const SEEN: &str = "hello world\nbin/.keep\nseen:\nbin\nhello\nlink\n\nseen/bin:\n.keep\nseen/bin\n";

fn mounted_for_one(case: &Case, place: &[&str]) {
    tree(case, "tree");
    case.make_dir("seen");
    store(case, &["add", "tree"], place).code(0);
    let mount = |command: &[&str]| {
        let mut mount = case.cofferdam(["store", "mount", TREE, "seen"]);
        mount.args(place).arg("--").args(command);
        mount
    };
    finish(mount(&["sh", "-c", LOOK])).code(0).says(SEEN);
    finish(mount(&["sh", "-c", "exit 7"])).code(7);
    finish(mount(&["sh", "-c", "kill -KILL $$"])).code(137);
    // It is told of SIGTERM, and nobody else sees the mount.
    let mut running = Running::start(mount(&[
        "sh",
        "-c",
        "trap 'echo told; exit 9' TERM; echo ready; while :; do sleep 0.1; done",
    ]));
    running.wait_for("ready\n");
    assert_eq!(std::fs::read_dir(case.path("seen")).unwrap().count(), 0);
    running.signal(Signal::SIGTERM);
    running.finish().code(9).says("ready\ntold\n");
    assert_eq!(std::fs::read_dir(case.path("seen")).unwrap().count(), 0);
}

fn mounted_for_a_command(case: &Case) {
    mounted_for_one(case, &["--state-dir", "state"]);
}

fn mounted_for_a_command_from_a_daemon(case: &Case) {
    let daemon = Daemon::start(case, &["--no-builds"]);
    mounted_for_one(case, &["--to", &daemon.address()]);
}

/// In a mount namespace of its own, lest the tests' own be left with a dead mount.
fn mounted_for_all(case: &Case) {
    tree(case, "tree");
    case.make_dir("seen");
    store(case, &["add", "tree"], &["--state-dir", "state"]).code(0);
    let script = format!(
        "\"$0\" store mount {TREE} seen --state-dir state & mount=$!
         until test -e seen/hello; do sleep 0.05; done
         {LOOK}
         $END
         wait $mount; echo \"code $?\"; ls -A seen; grep -c seen /proc/self/mountinfo"
    );
    for end in
        ["kill -TERM $mount", "kill -INT $mount", "umount seen", "cd seen; umount --lazy ../seen; cd .."]
    {
        let mut command = case.program("unshare");
        command.args(["--mount", "bash", "-mc", &script.replace("$END", end)]).arg(support::binary());
        let ran = finish(command);
        assert_eq!(ran.out(), format!("{SEEN}code 0\n0\n"), "{end}: {ran}");
        assert!(ran.err().contains("is mounted at"), "{ran}");
    }
}
