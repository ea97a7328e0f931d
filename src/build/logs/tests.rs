use std::io::{PipeWriter, Write};
use std::os::fd::OwnedFd;
use std::thread;

use proptest::collection::vec;
use proptest::prelude::*;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::*;

const SOON: Duration = Duration::from_secs(10);

fn split(bytes: &[u8]) -> Vec<usize> {
    let mut splitter = LineSplitter::new();
    splitter.feed(bytes);
    let mut pieces: Vec<_> = std::iter::from_fn(|| splitter.next_piece()).map(|piece| piece.len()).collect();
    pieces.extend(splitter.flush().map(|piece| piece.len()));
    pieces
}

#[test]
fn where_lines_are_cut() {
    let long = |len: usize, end: &str| [vec![b'x'; len], end.as_bytes().to_vec()].concat();
    let cases = [
        ("nothing", b"".to_vec(), vec![]),
        ("one line", b"ab\n".to_vec(), vec![3]),
        ("half a line", b"ab".to_vec(), vec![2]),
        ("lines and a half", b"a\n\nbc\nd".to_vec(), vec![2, 1, 3, 1]),
        ("carriage returns are bytes", b"a\r\nb\rc\n".to_vec(), vec![3, 4]),
        ("bytes of any kind", b"\0\xff\n\x1b[0m".to_vec(), vec![3, 4]),
        ("the longest line", long(MAX_PIECE - 1, "\n"), vec![MAX_PIECE]),
        ("one byte more", long(MAX_PIECE, "\n"), vec![MAX_PIECE, 1]),
        ("the longest half line", long(MAX_PIECE, ""), vec![MAX_PIECE]),
        ("three pieces", long(2 * MAX_PIECE + 1, "\n"), vec![MAX_PIECE, MAX_PIECE, 2]),
    ];
    for (name, bytes, pieces) in cases {
        assert_eq!(split(&bytes), pieces, "{name}");
    }
}

/// Bytes with few or many newlines, and now and then a line of more than one piece.
fn output() -> impl Strategy<Value = Vec<u8>> {
    let short = vec(prop_oneof![3 => any::<u8>(), 1 => Just(b'\n')], 0..200);
    let line = vec(prop_oneof![Just(b'a'), Just(0), Just(0xff)], 0..50).prop_map(|mut line| {
        line.push(b'\n');
        line
    });
    let long = (MAX_PIECE - 2..2 * MAX_PIECE + 2).prop_map(|len| vec![b'l'; len]);
    prop_oneof![8 => short, 8 => line, 1 => long]
}

fn check_piece(piece: &[u8]) {
    assert!(!piece.is_empty() && piece.len() <= MAX_PIECE, "{}", piece.len());
    let newline = piece.iter().position(|&byte| byte == b'\n');
    assert!(newline.is_none_or(|at| at + 1 == piece.len()), "a newline within a piece");
}

proptest! {
    #[test]
    fn splitting_keeps_every_byte(chunks in vec((output(), any::<bool>()), 0..20)) {
        let mut splitter = LineSplitter::new();
        let (mut fed, mut out) = (Vec::new(), Vec::new());
        for (bytes, flush) in chunks {
            splitter.feed(&bytes);
            fed.extend(bytes);
            let whole = std::iter::from_fn(|| splitter.next_piece()).collect::<Vec<_>>();
            for piece in whole {
                check_piece(&piece);
                assert!(piece.ends_with(b"\n") || piece.len() == MAX_PIECE);
                out.extend(piece);
            }
            assert!(splitter.held.len() < MAX_PIECE);
            if flush && let Some(piece) = splitter.flush() {
                check_piece(&piece);
                out.extend(piece);
            }
        }
        out.extend(splitter.flush().unwrap_or_default());
        prop_assert!(out == fed);
    }
}

/// The two pipes, a pump that reads them, what it sends, and the signal that the sandbox is dead.
struct Build {
    stdout: PipeWriter,
    stderr: PipeWriter,
    events: mpsc::Receiver<Event>,
    dead: oneshot::Sender<()>,
    pump: tokio::task::JoinHandle<Result<(), LogError>>,
}

fn build(capacity: usize) -> Build {
    let pipe = || {
        let (reader, writer) = std::io::pipe().unwrap();
        (Receiver::from_owned_fd(OwnedFd::from(reader)).unwrap(), writer)
    };
    let ((out_reader, stdout), (err_reader, stderr)) = (pipe(), pipe());
    let (sender, events) = mpsc::channel(capacity);
    let (dead, heard) = oneshot::channel();
    let dead_heard = async move {
        if heard.await.is_err() {
            std::future::pending().await
        }
    };
    let pump = tokio::spawn(pump(out_reader, err_reader, dead_heard, sender));
    Build { stdout, stderr, events, dead, pump }
}

/// Everything that was sent, by stream; checks each piece.
async fn collect(events: &mut mpsc::Receiver<Event>) -> [Vec<u8>; 2] {
    let mut logs = [Vec::new(), Vec::new()];
    while let Some(event) = events.recv().await {
        let Event::Log { stream, data } = event else { panic!("{event:?}") };
        check_piece(&data);
        logs[usize::from(stream == LogStream::Stderr)].extend_from_slice(&data);
    }
    logs
}

async fn next_data(events: &mut mpsc::Receiver<Event>) -> Bytes {
    match timeout(SOON, events.recv()).await {
        Ok(Some(Event::Log { data, .. })) => data,
        other => panic!("{other:?}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Two writers at their own pace; the sandbox dies with full pipes, or the pipes end by themselves.
    #[test]
    fn what_was_written_is_what_is_sent(
        writers in [vec((output(), 0..3_u64), 0..12), vec((output(), 0..3_u64), 0..12)],
        capacity in 1..20_usize,
        dies in any::<bool>(),
    ) {
        Runtime::new().unwrap().block_on(async {
            let Build { stdout, stderr, mut events, dead, pump } = build(capacity);
            let threads: Vec<_> = [stdout, stderr].into_iter().zip(writers.clone()).map(|(mut pipe, chunks)| {
                thread::spawn(move || {
                    for (bytes, pause) in chunks {
                        pipe.write_all(&bytes).unwrap();
                        thread::sleep(Duration::from_millis(pause));
                    }
                    pipe
                })
            }).collect();
            // Where the sandbox dies, someone else keeps the pipes open.
            let waiter = tokio::task::spawn_blocking(move || {
                let pipes: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
                if dies {
                    dead.send(()).unwrap();
                    Some(pipes)
                } else {
                    // A dropped sender is no death.
                    drop((dead, pipes));
                    None
                }
            });
            let logs = timeout(SOON, collect(&mut events)).await.expect("the log ends");
            pump.await.unwrap().unwrap();
            drop(waiter.await.unwrap());
            for (log, chunks) in logs.iter().zip(&writers) {
                let written: Vec<u8> = chunks.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
                assert!(*log == written, "{} bytes written, {} sent", written.len(), log.len());
            }
        });
    }
}

#[tokio::test]
async fn half_a_line_is_flushed_in_time() {
    let Build { mut stdout, stderr: _stderr, mut events, .. } = build(8);
    stdout.write_all(b"whole\nhalf").unwrap();
    let written = Instant::now();
    assert_eq!(next_data(&mut events).await, "whole\n");
    assert_eq!(next_data(&mut events).await, "half");
    assert!(written.elapsed() >= FLUSH_AFTER, "{:?}", written.elapsed());
    assert!(written.elapsed() < FLUSH_AFTER * 10, "{:?}", written.elapsed());
    stdout.write_all(b" line\n").unwrap();
    assert_eq!(next_data(&mut events).await, " line\n");
}

#[tokio::test]
async fn a_line_that_grows_is_not_held_for_ever() {
    let Build { mut stdout, stderr: _stderr, mut events, .. } = build(8);
    let writer = thread::spawn(move || {
        for _ in 0..20 {
            stdout.write_all(b".").unwrap();
            thread::sleep(FLUSH_AFTER / 4);
        }
    });
    let mut dots = 0;
    while let Ok(Some(Event::Log { data, .. })) = timeout(FLUSH_AFTER * 8, events.recv()).await {
        assert!(data.len() < 20, "all at once");
        dots += data.len();
    }
    writer.join().unwrap();
    assert_eq!(dots, 20);
}

/// Whoever got hold of a pipe, and writes to it without end, can't keep a dead build open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_smuggled_pipe_keeps_nobody_waiting() {
    let Build { stdout, stderr, mut events, dead, pump } = build(64);
    let mut smuggled = stdout;
    let flood = thread::spawn(move || {
        let mut written = 0_u64;
        while smuggled.write_all(&[b'x'; 4096]).is_ok() {
            written += 4096;
        }
        written
    });
    next_data(&mut events).await;
    dead.send(()).unwrap();
    timeout(SOON, collect(&mut events)).await.expect("the log ends");
    pump.await.unwrap().unwrap();
    assert!(flood.join().unwrap() > 0);
    drop(stderr);
}

#[tokio::test]
async fn a_full_pipe_of_the_largest_size_is_drained() {
    let Build { stdout, stderr, mut events, dead, pump } = build(1);
    let size = fcntl(&stdout, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
    let text: Vec<u8> =
        (0..).flat_map(|n: u32| format!("{n}\n").into_bytes()).take(usize::try_from(size).unwrap()).collect();
    // Written before the pump first runs, and dead before it reads a byte.
    (&stdout).write_all(&text).unwrap();
    (&stderr).write_all(b"last words").unwrap();
    dead.send(()).unwrap();
    let [out, err] = timeout(SOON, collect(&mut events)).await.expect("the log ends");
    assert!(out == text, "{} of {} bytes", out.len(), text.len());
    assert_eq!(err, b"last words");
    pump.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_slow_reader_stops_the_writer() {
    let Build { mut stdout, stderr: _stderr, mut events, .. } = build(4);
    let (progress, mut written) = tokio::sync::watch::channel(0_usize);
    let writer = thread::spawn(move || {
        for _ in 0..1024 {
            stdout.write_all(&[b'x'; 4096]).unwrap();
            progress.send_modify(|bytes| *bytes += 4096);
        }
    });
    // Nobody takes events: the writer comes to a stop with few pieces under way.
    let mut last = 0;
    while timeout(Duration::from_millis(300), written.changed()).await.is_ok() {
        last = *written.borrow_and_update();
    }
    let under_way = 4 * MAX_PIECE + 2 * MAX_PIECE + (64 << 10) + READ_SIZE;
    assert!(last > 0 && last <= under_way, "{last} bytes");
    let mut received = 0;
    while received < 4 << 20 {
        received += next_data(&mut events).await.len();
    }
    writer.join().unwrap();
}

#[tokio::test]
async fn a_lost_receiver_ends_the_pump() {
    let Build { mut stdout, stderr: _stderr, events, pump, .. } = build(1);
    drop(events);
    stdout.write_all(b"line\n").unwrap();
    let ended = timeout(SOON, pump).await.expect("the pump ends").unwrap();
    assert!(matches!(ended, Err(LogError::Closed)), "{ended:?}");
}
