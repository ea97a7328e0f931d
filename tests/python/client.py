#!/usr/bin/env python3
"""A client that is not ours, against a daemon of its own on a unix socket.

usage: client.py [Client.test_NAME]...     (tests/python.rs prepares what it needs and runs every case)

Environment: COFFERDAM is the binary, COFFERDAM_HOST_TOOLS the host paths that a build gets its shell from
(colon-separated), PYTHONPATH names the stubs generated from proto/protos. The working directory is written to.
"""

import os
import pathlib
import platform
import signal
import subprocess
import sys
import threading
import time
import unittest

import grpc
from blake3 import blake3
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from snix.build.protos import build_pb2, rpc_build_pb2_grpc
from snix.castore.protos import castore_pb2, rpc_blobstore_pb2, rpc_blobstore_pb2_grpc, rpc_directory_pb2
from snix.castore.protos import rpc_directory_pb2_grpc

HOST_TOOLS = sorted(os.environ["COFFERDAM_HOST_TOOLS"].split(":"))
STDOUT, STDERR = build_pb2.LogOutput.STREAM_STDOUT, build_pb2.LogOutput.STREAM_STDERR

EMPTY = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
KEEP = "8b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e"
TREE = "fb8c6e81db869c486d76733de6593944cfe2a311d452e478ec7e5180d77a0617"
TREE_ENCODING = (
    "0a290a0362696e12208b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e1802122d0a0568656c6c6f1220"
    "dc5a4edb8240b018124052c330270696f96771a63b45250a5c17d3000e823355180c20011a110a046c696e6b120962696e2f2e6b656570"
)


def digest(data):
    return blake3(data).digest()


# gRPC's C core names the percent-encoded path of a unix socket as the authority, which HTTP/2 servers that check it
# refuse as malformed.
OPTIONS = [("grpc.default_authority", "localhost")]


class Daemon:
    """A daemon process, and the services that it offers."""

    def __init__(self, *flags):
        self.state = pathlib.Path.cwd() / "state"
        socket = pathlib.Path.cwd() / "socket"
        allowed = [flag for path in HOST_TOOLS for flag in ("--allow-host-path", path)]
        command = [os.environ["COFFERDAM"], "daemon", "--listen", f"unix:{socket}", "--state-dir", str(self.state)]
        self.process = subprocess.Popen([*command, *allowed, *flags], stderr=subprocess.PIPE, text=True)
        self.said = []
        for line in self.process.stderr:
            self.said.append(line)
            if f"listening on unix:{socket}" in line:
                break
        else:
            raise RuntimeError("the daemon ended: " + "".join(self.said))
        # Nobody reads on in time otherwise, and a full pipe would stop the daemon.
        threading.Thread(target=lambda: self.said.extend(self.process.stderr), daemon=True).start()
        self.address = f"unix:{socket}"
        self.connect()

    def connect(self):
        self.channel = grpc.insecure_channel(self.address, OPTIONS)
        self.blobs = rpc_blobstore_pb2_grpc.BlobServiceStub(self.channel)
        self.directories = rpc_directory_pb2_grpc.DirectoryServiceStub(self.channel)
        self.builds = rpc_build_pb2_grpc.BuildServiceStub(self.channel)

    def stop(self):
        self.channel.close()
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        print("the daemon said:\n" + "".join(self.said), file=sys.stderr)

    # The store, as a client sees it.

    def put_blob(self, data, chunk=1 << 20):
        pieces = [data[at : at + chunk] for at in range(0, len(data), chunk)]
        return self.blobs.Put((rpc_blobstore_pb2.BlobChunk(data=piece) for piece in pieces), timeout=60).digest

    def read_blob(self, key):
        return b"".join(c.data for c in self.blobs.Read(rpc_blobstore_pb2.ReadBlobRequest(digest=key), timeout=60))

    def put_directories(self, *directories):
        return self.directories.Put(iter(directories), timeout=60).root_digest

    def get_directories(self, key, recursive=False):
        request = rpc_directory_pb2.GetDirectoryRequest(digest=key, recursive=recursive)
        return list(self.directories.Get(request, timeout=60))

    def file(self, name, data, executable=False):
        key = self.put_blob(data)
        return castore_pb2.FileEntry(name=name, digest=key, size=len(data), executable=executable)

    # What it leaves on the host.

    def scratch(self):
        builds = self.state / "builds"
        return sorted(os.listdir(builds)) if builds.exists() else []

    def mounts(self):
        try:
            return pathlib.Path(f"/proc/{self.process.pid}/mountinfo").read_text().splitlines()
        except FileNotFoundError:
            return []


def processes(marker):
    """The live processes that carry the marker in their arguments."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            arguments = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if marker.encode() in arguments:
            found.append((pid, arguments))
    return found


def request(script="true", **fields):
    """A request for /bin/sh -c SCRIPT with the host's tools; outputs lie under outputs/."""
    constraints = build_pb2.BuildRequest.BuildConstraints(
        system=platform.machine() + "-linux", available_ro_paths=HOST_TOOLS
    )
    fields = {
        "command_args": ["/bin/sh", "-c", script],
        "working_dir": "build",
        "scratch_paths": ["build", "outputs"],
        "inputs_dir": "inputs",
        "environment_vars": [build_pb2.BuildRequest.EnvVar(key="PATH", value=b"/usr/bin:/bin")],
        "constraints": constraints,
        **fields,
    }
    return build_pb2.BuildRequest(**fields)


def entry(**kind):
    return castore_pb2.Entry(**kind)


def kinds(events):
    return [event.WhichOneof("event") for event in events]


def logged(events, stream):
    return b"".join(event.log.data for event in events if event.WhichOneof("event") == "log" and event.log.stream == stream)


class Client(unittest.TestCase):
    def start(self, *flags):
        daemon = Daemon(*flags)

        self.addCleanup(daemon.stop)
        return daemon

    def build(self, daemon, wanted):
        """All events of a build, in an order that is right."""
        events = list(daemon.builds.DoBuild(wanted, timeout=60))
        names = kinds(events)
        self.assertEqual(names[0], "started", names)
        self.assertNotEqual(events[0].started.build_id, "")
        self.assertIn(names[-1], ["completed", "failed"])
        middle = names[1:-1]
        logs = middle.count("log")
        self.assertEqual(middle[:logs], ["log"] * logs, names)
        refscans = [event.refscan for event in events[1 + logs : -1]]
        if names[-1] == "completed":
            self.assertEqual(middle[logs:], ["refscan"] * len(wanted.outputs), names)
            self.assertEqual([scan.output_index for scan in refscans], list(range(len(wanted.outputs))))
            outputs = events[-1].completed.outputs
            self.assertEqual([list(o.needles) for o in outputs], [list(s.found_needles) for s in refscans])
            for output in outputs:
                kind = output.output.WhichOneof("entry")
                self.assertEqual(getattr(output.output, kind).name, b"", "the root of an output has no name")
        return events

    def refused(self, code, *texts, call):
        """Asserts that the call ends in one error and no event; returns its text."""
        with self.assertRaises(grpc.RpcError) as caught:
            for event in call:
                self.fail(f"an event before the refusal: {event}")
        self.assertEqual(caught.exception.code(), code, caught.exception)
        for text in texts:
            self.assertIn(text, caught.exception.details())
        return caught.exception.details()

    def soon(self, what, remains):
        """Waits at most 2 s until nothing remains."""
        start = time.monotonic()
        while left := remains():
            self.assertLess(time.monotonic() - start, 2.0, f"after 2 s there is still {what}: {left}")
            time.sleep(0.01)

    # The store.

    def test_blobs_come_back(self):
        daemon = self.start()
        whole = bytes(range(256)) * 40_000
        for data in [b"", b"x", b"hello world\n", whole]:
            # How it is cut up carries no meaning; messages of up to 4 MiB are gRPC's default.
            for chunk in [3 << 20, 1 << 17]:
                key = daemon.put_blob(data, chunk)
                self.assertEqual(key, digest(data))
            daemon.blobs.Stat(rpc_blobstore_pb2.StatBlobRequest(digest=key))
            self.assertEqual(daemon.read_blob(key), data)

    def test_directories_have_the_known_digests(self):
        daemon = self.start("--no-builds")
        empty = castore_pb2.Directory()
        self.assertEqual(daemon.put_directories(empty).hex(), EMPTY)
        keep = castore_pb2.Directory(files=[daemon.file(b".keep", b"")])
        self.assertEqual(daemon.put_directories(keep).hex(), KEEP)
        tree = castore_pb2.Directory(
            directories=[castore_pb2.DirectoryEntry(name=b"bin", digest=bytes.fromhex(KEEP), size=2)],
            files=[daemon.file(b"hello", b"hello world\n", executable=True)],
            symlinks=[castore_pb2.SymlinkEntry(name=b"link", target=b"bin/.keep")],
        )
        self.assertEqual(tree.SerializeToString().hex(), TREE_ENCODING)
        self.assertEqual(daemon.put_directories(keep, tree).hex(), TREE)
        self.assertEqual(daemon.get_directories(bytes.fromhex(TREE)), [tree])
        self.assertEqual(daemon.get_directories(bytes.fromhex(TREE), recursive=True), [tree, keep])
        self.assertEqual(daemon.get_directories(bytes.fromhex(EMPTY)), [empty])
        # As a child it has the size that real clients compute: 2 x entries + the children's sizes.
        parent = castore_pb2.Directory(
            directories=[castore_pb2.DirectoryEntry(name=b"t", digest=bytes.fromhex(TREE), size=8)]
        )
        key = daemon.put_directories(keep, tree, parent)
        self.assertEqual(key, digest(parent.SerializeToString(deterministic=True)))
        self.assertEqual(len(daemon.get_directories(key, recursive=True)), 3)

    def test_each_digest_comes_once(self):
        daemon = self.start("--no-builds")
        leaf = castore_pb2.Directory(symlinks=[castore_pb2.SymlinkEntry(name=b"l", target=b"t")])
        key = digest(leaf.SerializeToString())
        names = [b"a", b"b", b"c"]
        root = castore_pb2.Directory(
            directories=[castore_pb2.DirectoryEntry(name=name, digest=key, size=2) for name in names]
        )
        self.assertEqual(daemon.get_directories(daemon.put_directories(leaf, root), recursive=True), [root, leaf])

    def test_what_is_not_there(self):
        daemon = self.start("--no-builds")
        key = digest(b"never stored")
        missing = grpc.StatusCode.NOT_FOUND
        self.refused(missing, call=daemon.blobs.Read(rpc_blobstore_pb2.ReadBlobRequest(digest=key)))
        self.refused(missing, call=daemon.directories.Get(rpc_directory_pb2.GetDirectoryRequest(digest=key)))
        with self.assertRaises(grpc.RpcError) as caught:
            daemon.blobs.Stat(rpc_blobstore_pb2.StatBlobRequest(digest=key))
        self.assertEqual(caught.exception.code(), missing)

    def test_bad_directories_are_refused(self):
        daemon = self.start("--no-builds")
        link = lambda name, target=b"t": castore_pb2.SymlinkEntry(name=name, target=target)
        links = lambda *names: castore_pb2.Directory(symlinks=[link(name) for name in names])
        leaf = links(b"l")
        child = lambda **fields: castore_pb2.Directory(
            directories=[
                castore_pb2.DirectoryEntry(
                    **{"name": b"d", "digest": digest(leaf.SerializeToString()), "size": 2, **fields}
                )
            ]
        )
        table = {
            "unsorted": [links(b"b", b"a")],
            "twice": [links(b"a", b"a")],
            "dot": [links(b".")],
            "dots": [links(b"..")],
            "slash": [links(b"a/b")],
            "no name": [links(b"")],
            "nul": [links(b"a\0")],
            "long name": [links(b"n" * 256)],
            "no target": [castore_pb2.Directory(symlinks=[link(b"a", b"")])],
            "nul in the target": [castore_pb2.Directory(symlinks=[link(b"a", b"x\0")])],
            "short digest": [leaf, child(digest=b"short")],
            "wrong size": [leaf, child(size=1)],
            "parent first": [child(), leaf],
            "unknown child": [child(digest=digest(b"nobody"))],
            "unreachable": [leaf, links(b"root")],
            "nothing": [],
        }
        for name, directories in table.items():
            with self.subTest(name):
                with self.assertRaises(grpc.RpcError) as caught:
                    daemon.put_directories(*directories)
                self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT, caught.exception.details())

    # Builds.

    def test_a_build(self):
        daemon = self.start()
        sub = castore_pb2.Directory(files=[daemon.file(b"word", b"world\n")])
        sub_key = daemon.put_directories(sub)
        top = castore_pb2.Directory(
            directories=[castore_pb2.DirectoryEntry(name=b"sub", digest=sub_key, size=2)],
            files=[daemon.file(b"tool", b"#!/bin/sh\necho tool\n", executable=True)],
        )
        key = daemon.put_directories(sub, top)
        inputs = [
            entry(file=daemon.file(b"bare", b"hello ")),
            entry(symlink=castore_pb2.SymlinkEntry(name=b"dangling", target=b"/no/where")),
            entry(directory=castore_pb2.DirectoryEntry(name=b"top", digest=key, size=6)),
        ]
        script = """
            echo to stdout; echo to stderr >&2; printf 'half a line'
            cat /inputs/bare /inputs/top/sub/word > /outputs/file
            mkdir -p /outputs/dir/inner; ln -s inner /outputs/dir/link; echo x > /outputs/dir/inner/x
            /inputs/top/tool > /outputs/dir/tool; chmod 755 /outputs/dir/tool
            readlink /inputs/dangling; cat /extra/file; echo "$VALUE"
            ln -s somewhere /outputs/link
        """
        wanted = request(
            script,
            inputs=inputs,
            outputs=["outputs/link", "outputs/file", "outputs/dir"],
            additional_files=[build_pb2.BuildRequest.AdditionalFile(path="extra/file", contents=b"extra\n")],
            environment_vars=[
                build_pb2.BuildRequest.EnvVar(key="PATH", value=b"/usr/bin:/bin"),
                build_pb2.BuildRequest.EnvVar(key="VALUE", value=b"\xff\xfe"),
            ],
        )
        events = self.build(daemon, wanted)
        self.assertEqual(logged(events, STDOUT), b"to stdout\nhalf a line/no/where\nextra\n\xff\xfe\n")
        self.assertEqual(logged(events, STDERR), b"to stderr\n")
        link, file, tree = [output.output for output in events[-1].completed.outputs]
        self.assertEqual(link.symlink.target, b"somewhere")
        self.assertEqual(file.file.digest, digest(b"hello world\n"))
        self.assertEqual((file.file.size, file.file.executable), (12, False))
        self.assertEqual(daemon.read_blob(file.file.digest), b"hello world\n")
        root, inner = daemon.get_directories(tree.directory.digest, recursive=True)
        self.assertEqual(tree.directory.digest, digest(root.SerializeToString(deterministic=True)))
        self.assertEqual(tree.directory.size, 2 * 3 + 2 * 1)
        self.assertEqual([d.name for d in root.directories], [b"inner"])
        self.assertEqual(root.directories[0].digest, digest(inner.SerializeToString(deterministic=True)))
        self.assertEqual([(f.name, f.executable, f.digest) for f in root.files], [(b"tool", True, digest(b"tool\n"))])
        self.assertEqual([(s.name, s.target) for s in root.symlinks], [(b"link", b"inner")])
        self.assertEqual(daemon.read_blob(inner.files[0].digest), b"x\n")

    def test_outputs_beside_inputs(self):
        """Inputs' directory, scratch and outputs nest, as in a Nix build."""
        daemon = self.start()
        wanted = request(
            "cat nix/store/in /nix/store/in > /nix/store/out 2>/build/err; cat /nix/store/in >> /nix/store/out; "
            "echo littering > /nix/store/litter; rm -f /nix/store/in 2>/dev/null; cat /nix/store/in",
            inputs=[entry(file=daemon.file(b"in", b"in\n"))],
            inputs_dir="nix/store",
            scratch_paths=["build", "nix/store"],
            outputs=["nix/store/out"],
        )
        events = self.build(daemon, wanted)
        self.assertEqual(logged(events, STDOUT), b"in\n")
        key = events[-1].completed.outputs[0].output.file.digest
        self.assertEqual(daemon.read_blob(key), b"in\nin\n")

    def test_outputs_are_inputs_of_the_next(self):
        daemon = self.start()
        first = self.build(daemon, request("mkdir /outputs/o; echo 1 > /outputs/o/n", outputs=["outputs/o"]))
        made = first[-1].completed.outputs[0].output.directory
        made.name = b"o"
        wanted = request("cat /inputs/o/n", inputs=[entry(directory=made)])
        self.assertEqual(logged(self.build(daemon, wanted), STDOUT), b"1\n")

    def test_log_pieces(self):
        daemon = self.start()
        script = "printf half; sleep 0.6; echo ' whole'; head -c 200000 /dev/zero | tr '\\0' x; seq 1 5000"
        events = self.build(daemon, request(script))
        data = [event.log.data for event in events if event.WhichOneof("event") == "log"]
        numbers = "".join(f"{n}\n" for n in range(1, 5001)).encode()
        self.assertEqual(b"".join(data), b"half whole\n" + b"x" * 200_000 + numbers)
        self.assertEqual(data[0], b"half", "half a line is flushed after 100 ms")
        self.assertLessEqual(max(map(len, data)), 64 << 10)
        self.assertEqual(data[-1], b"5000\n")
        self.assertTrue(all(piece.count(b"\n") <= 1 for piece in data), "one line at a time")

    def test_failures_are_the_builds(self):
        daemon = self.start()
        table = {
            "exit 7": (request("exit 7"), 7, "7"),
            "signal": (request("kill -KILL $$"), 137, "9"),
            "not there": (request(command_args=["/no/such/program"]), 127, "/no/such/program"),
            "not executable": (
                request(command_args=["/inputs/f"], inputs=[entry(file=daemon.file(b"f", b"text"))]), 126, "/inputs/f"),
            "outputs missing": (
                request("echo x > /outputs/b", outputs=["outputs/a", "outputs/b", "outputs/c"]), None, "outputs/a"),
            "the other one missing": (
                request("echo x > /outputs/b", outputs=["outputs/a", "outputs/b", "outputs/c"]), None, "outputs/c"),
            "fifo": (request("mkfifo /outputs/a", outputs=["outputs/a"]), None, "outputs/a"),
        }
        for name, (wanted, code, text) in table.items():
            with self.subTest(name):
                events = self.build(daemon, wanted)
                self.assertEqual(kinds(events)[-1], "failed")
                self.assertNotIn("refscan", kinds(events))
                failed = events[-1].failed
                self.assertIn(text, failed.message)
                if code is not None:
                    self.assertEqual(failed.exit_code, code)
        self.soon("a scratch directory", daemon.scratch)

    def test_malformed_requests(self):
        daemon = self.start()
        file = lambda name, **fields: entry(file=castore_pb2.FileEntry(
            **{"name": name, "digest": bytes.fromhex(EMPTY), "size": 0, **fields}))
        env = lambda key, value=b"": build_pb2.BuildRequest.EnvVar(key=key, value=value)
        extra = lambda path: build_pb2.BuildRequest.AdditionalFile(path=path, contents=b"")
        table = [
            (dict(command_args=[]), "command_args"),
            (dict(command_args=["/bin/sh", "a\0b"]), "command_args[1]"),
            (dict(working_dir=""), "working_dir"),
            (dict(working_dir="/build"), "working_dir"),
            (dict(working_dir="build/.."), "working_dir"),
            (dict(scratch_paths=["build", "build"]), "scratch_paths[1]"),
            (dict(scratch_paths=["outputs", "build"]), "scratch_paths[1]"),
            (dict(scratch_paths=["build", "../x"]), "scratch_paths[1]"),
            (dict(inputs_dir="/inputs"), "inputs_dir"),
            (dict(outputs=["outputs/a", "elsewhere/b"]), "outputs[1]"),
            (dict(outputs=["outputs/a", "outputs/a"]), "outputs[1]"),
            (dict(outputs=["outputs/a", "outputs/a//b"]), "outputs[1]"),
            (dict(environment_vars=[env("A"), env("A")]), "environment_vars[1]"),
            (dict(environment_vars=[env("")]), "environment_vars[0]"),
            (dict(environment_vars=[env("A=B")]), "environment_vars[0]"),
            (dict(environment_vars=[env("A", b"\0")]), "environment_vars[0]"),
            (dict(additional_files=[extra("/etc/x")]), "additional_files[0]"),
            (dict(additional_files=[extra("x"), extra("x")]), "additional_files[1]"),
            (dict(refscan_needles=["a", ""]), "refscan_needles[1]"),
            (dict(inputs=[castore_pb2.Entry()]), "inputs[0]"),
            (dict(inputs=[file(b"")]), "inputs[0]"),
            (dict(inputs=[file(b"..")]), "inputs[0]"),
            (dict(inputs=[file(b"a/b")]), "inputs[0]"),
            (dict(inputs=[file(b"b"), file(b"a")]), "inputs[1]"),
            (dict(inputs=[file(b"a"), file(b"a")]), "inputs[1]"),
            (dict(inputs=[file(b"a", digest=b"short")]), "inputs[0]"),
        ]
        for fields, text in table:
            with self.subTest(text, **{key: str(value) for key, value in fields.items()}):
                call = daemon.builds.DoBuild(request("echo ran", **fields), timeout=60)
                self.refused(grpc.StatusCode.INVALID_ARGUMENT, text, call=call)
        self.assertEqual(daemon.scratch(), [])

    def test_what_this_worker_does_not_offer(self):
        daemon = self.start()
        constraints = lambda **fields: build_pb2.BuildRequest.BuildConstraints(
            **{"system": platform.machine() + "-linux", "available_ro_paths": HOST_TOOLS, **fields})
        table = [
            (constraints(system="riscv64-plan9"), "riscv64-plan9"),
            (constraints(available_ro_paths=[*HOST_TOOLS, "/var"]), "/var"),
            (constraints(network_access=True), "network"),
            (constraints(min_memory=1 << 62), "min_memory"),
            (constraints(available_ro_paths=[], provide_bin_sh=True), "/bin/sh"),
        ]
        for wanted, text in table:
            with self.subTest(text):
                call = daemon.builds.DoBuild(request("echo ran", constraints=wanted), timeout=60)
                self.refused(grpc.StatusCode.FAILED_PRECONDITION, text, call=call)

    def test_missing_inputs_are_listed(self):
        daemon = self.start()
        gone = [digest(b"not there %d" % n) for n in range(3)]
        # One of them is missing below a directory that is there.
        half = castore_pb2.Directory(files=[castore_pb2.FileEntry(name=b"inner", digest=gone[2], size=1)])
        inputs = [
            entry(file=castore_pb2.FileEntry(name=b"a", digest=gone[0], size=1)),
            entry(directory=castore_pb2.DirectoryEntry(name=b"b", digest=gone[1], size=0)),
            entry(directory=castore_pb2.DirectoryEntry(name=b"c", digest=daemon.put_directories(half), size=2)),
        ]
        call = daemon.builds.DoBuild(request("echo ran", inputs=inputs), timeout=60)
        text = self.refused(grpc.StatusCode.FAILED_PRECONDITION, call=call)
        for key, path in zip(gone, ["a", "b", "c/inner"]):
            self.assertIn(key.hex(), text)
            self.assertIn(path, text)

    def test_no_builds(self):
        daemon = self.start("--no-builds")
        self.refused(grpc.StatusCode.FAILED_PRECONDITION, "--no-builds", call=daemon.builds.DoBuild(request()))
        self.assertEqual(daemon.read_blob(daemon.put_blob(b"still a store")), b"still a store")

    # References.

    def test_needles(self):
        daemon = self.start()
        needles = ["absent", "name-ref", "target-ref", "content-ref", "ontent", "content-ref", "exec-ref"]
        script = """
            cd /outputs; printf 'xxcontent-refyy' > content
            mkdir name; touch name/a-name-ref-b
            ln -s ../target-ref/x link
            mkdir deep; mkdir deep/er; printf exec-ref > deep/er/file
            touch none
        """
        names = ["none", "content", "name", "link", "deep"]
        wanted = request(script, outputs=[f"outputs/{name}" for name in names], refscan_needles=needles)
        events = self.build(daemon, wanted)
        found = [list(event.refscan.found_needles) for event in events if event.WhichOneof("event") == "refscan"]
        self.assertEqual(found, [[], [3, 4, 5], [1], [2], [6]])

    def test_needles_across_read_boundaries(self):
        daemon = self.start()
        needle = "0123456789abcdefghijklmnopqrstuv"
        edges = [4 << 10, 64 << 10, 128 << 10, 256 << 10, 1 << 20]
        starts = [edge - cut for edge in edges for cut in (1, 16, 31)] + [0]
        script = "cd /outputs; " + "; ".join(
            f"{{ head -c {start} /dev/zero; printf {needle}; head -c 100 /dev/zero; }} > {n}"
            for n, start in enumerate(starts)
        )
        # One byte short of the needle must not count.
        script += f"; {{ head -c 65530 /dev/zero; printf {needle[:-1]}; head -c 100 /dev/zero; }} > short"
        outputs = [f"outputs/{n}" for n in range(len(starts))] + ["outputs/short"]
        events = self.build(daemon, request(script, outputs=outputs, refscan_needles=["not there", needle]))
        found = [list(output.needles) for output in events[-1].completed.outputs]
        self.assertEqual(dict(zip(starts, found)), dict.fromkeys(starts, [1]))
        self.assertEqual(found[-1], [])

    # How builds end before their time.

    def sleeping(self, daemon, marker):
        """A build that sleeps, with a grandchild that would stay; its stream."""
        script = f"trap '' TERM; setsid sleep {marker} & echo ready; sleep {marker}"
        stream = daemon.builds.DoBuild(request(script))
        self.assertEqual([next(stream).WhichOneof("event") for _ in range(2)], ["started", "log"])
        self.assertGreaterEqual(len(processes(marker)), 1)
        self.assertEqual(len(daemon.scratch()), 1)
        return stream

    def test_cancelling_leaves_nothing(self):
        daemon = self.start()
        self.build(daemon, request())
        mounts, host = daemon.mounts(), pathlib.Path("/proc/self/mountinfo").read_text()
        everything = len(processes(str(daemon.state)))
        for round in range(3):
            marker = f"{60_000 + round}.{os.getpid():07}"
            stream = self.sleeping(daemon, marker)
            stream.cancel()
            self.soon("a process", lambda: processes(marker))
            self.soon("a scratch directory", daemon.scratch)
            self.soon("a mount", lambda: [line for line in daemon.mounts() if line not in mounts])
            self.soon("a process of the daemon", lambda: processes(str(daemon.state))[everything:])
        self.assertEqual(pathlib.Path("/proc/self/mountinfo").read_text(), host)
        self.assertEqual(kinds(self.build(daemon, request())), ["started", "completed"])

    def test_a_lost_connection_is_a_cancelled_stream(self):
        daemon = self.start()
        marker = f"61000.{os.getpid():07}"
        self.sleeping(daemon, marker)
        daemon.channel.close()
        self.soon("a process", lambda: processes(marker))
        self.soon("a scratch directory", daemon.scratch)
        daemon.connect()
        self.build(daemon, request())

    def test_a_killed_daemon_leaves_nothing(self):
        daemon = self.start()
        host = pathlib.Path("/proc/self/mountinfo").read_text()
        marker = f"62000.{os.getpid():07}"
        stream = self.sleeping(daemon, marker)
        daemon.process.send_signal(signal.SIGKILL)
        with self.assertRaises(grpc.RpcError) as caught:
            next(stream)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
        daemon.process.wait()
        self.soon("a process", lambda: processes(marker))
        self.soon("a process of the daemon", lambda: processes(str(daemon.state)))
        self.soon("a scratch directory", daemon.scratch)
        self.assertEqual(pathlib.Path("/proc/self/mountinfo").read_text(), host)

    # The rest of what a client may ask.

    def test_a_second_client(self):
        daemon = self.start("--max-builds", "2")
        results = {}

        def one(name):
            channel = grpc.insecure_channel(daemon.address, OPTIONS)
            stub = rpc_build_pb2_grpc.BuildServiceStub(channel)
            wanted = request(f"echo {name}; sleep 0.3; echo {name} > /outputs/o", outputs=["outputs/o"])
            results[name] = list(stub.DoBuild(wanted, timeout=60))
            channel.close()

        threads = [threading.Thread(target=one, args=(f"client-{n}",)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len({events[0].started.build_id for events in results.values()}), 4)
        for name, events in results.items():
            self.assertEqual(kinds(events), ["started", "log", "refscan", "completed"])
            key = events[-1].completed.outputs[0].output.file.digest
            self.assertEqual(daemon.read_blob(key), f"{name}\n".encode())

    def test_health(self):
        for flags in [(), ("--no-builds",)]:
            daemon = self.start(*flags)
            stub = health_pb2_grpc.HealthStub(daemon.channel)
            states = {
                service: stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
                for service in ["", "snix.castore.v1.BlobService", "snix.build.v1.BuildService"]
            }
            serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
            self.assertEqual(list(states.values()), [serving, serving, not_serving if flags else serving])
            daemon.stop()

    def test_reflection(self):
        daemon = self.start()
        services = set(ProtoReflectionDescriptorDatabase(daemon.channel).get_services())
        expected = {
            "snix.build.v1.BuildService",
            "snix.castore.v1.BlobService",
            "snix.castore.v1.DirectoryService",
            "grpc.health.v1.Health",
        }
        self.assertEqual(expected - services, set())


if __name__ == "__main__":
    unittest.main(verbosity=2)
