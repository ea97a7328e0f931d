//! What the build sees of itself and of the world.

use std::collections::BTreeSet;

use crate::named;
use crate::support::{Case, case::finish};

pub fn tests() -> impl IntoIterator<Item = (&'static str, fn(&Case))> {
    named![
        working_directory,
        identity,
        no_privileges,
        only_the_standard_descriptors,
        names,
        only_loopback,
        the_root,
        the_root_is_not_writable,
        tmp_is_writable,
        devices,
        etc,
        environment_is_documented,
        environment_is_what_was_given,
        umask_and_signals,
        own_processes_only,
    ]
}

fn working_directory(case: &Case) {
    case.run(&[], "pwd; echo x > file && cat file; ls").code(0).says("/build\nx\nfile\n");
}

fn identity(case: &Case) {
    case.run(&[], "id -u; id -g; id -G; id -un").code(0).says("1000\n100\n100\nnixbld\n");
}

fn no_privileges(case: &Case) {
    let ran = case.run(&[], "grep -E '^(Cap(Inh|Prm|Eff|Amb)|NoNewPrivs):' /proc/self/status").code(0);
    let none = "0000000000000000";
    ran.says(&format!(
        "CapInh:\t{none}\nCapPrm:\t{none}\nCapEff:\t{none}\nCapAmb:\t{none}\nNoNewPrivs:\t1\n"
    ));
}

fn only_the_standard_descriptors(case: &Case) {
    // The shell stays (it has more to do than `ls`), so these are its own descriptors.
    case.run(&[], "ls /proc/$$/fd; :").code(0).says("0\n1\n2\n");
}

fn names(case: &Case) {
    let script = "uname -n; cat /proc/sys/kernel/domainname";
    case.run(&[], script).code(0).says("localhost\n(none)\n");
}

fn only_loopback(case: &Case) {
    case.run(&[], "tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' '").code(0).says("lo\n");
    // Refused, so there was someone to refuse; not even a way, to anywhere else.
    let connect = |address: &str| {
        let script = format!("exec 3<>/dev/tcp/{address}");
        finish(case.cofferdam(["run", "--host-tools", "--", "bash", "-c", &script]))
    };
    connect("127.0.0.1/9").code(1).complains("refused");
    connect("::1/9").code(1).complains("refused");
    connect("192.0.2.1/9").code(1).complains("unreachable");
}

fn the_root(case: &Case) {
    case.write("marker", "of the host");
    let expected = BTreeSet::from([
        "bin", "build", "dev", "etc", "inputs", "lib", "lib32", "lib64", "libx32", "outputs", "proc", "sbin",
        "tmp", "usr",
    ]);
    let seen = case.run(&["--input", "i=marker"], "ls /").code(0).out();
    for name in ["bin", "build", "dev", "etc", "inputs", "outputs", "proc", "tmp", "usr"] {
        assert!(seen.lines().any(|line| line == name), "no {name} in {seen}");
    }
    let unexpected: Vec<&str> = seen.lines().filter(|name| !expected.contains(name)).collect();
    assert_eq!(unexpected, Vec::<&str>::new());
    let marker = case.path("marker");
    let script = format!("ls -d {} /root /home /proc/1/root/root 2>/dev/null; echo looked", marker.display());
    case.run(&[], &script).code(0).says("looked\n");
    // The old root is gone from the mount table, not only covered.
    let table = case.run(&[], "cut -d' ' -f5 /proc/self/mountinfo").code(0).out();
    let strange = |point: &&str| {
        ["/home", "/root", "/var", "/run", "/sys", "/mnt", "/old"].iter().any(|p| point.starts_with(p))
    };
    assert_eq!(table.lines().find(strange), None, "{table}");
}

fn the_root_is_not_writable(case: &Case) {
    let script = "for d in / /etc /usr /bin /dev /proc/sys /inputs; do \
                  touch $d/new 2>/dev/null && echo $d; mkdir $d/newdir 2>/dev/null && echo $d; done; echo tried";
    case.write("file", "");
    case.run(&["--input", "file=file"], script).code(0).says("tried\n");
}

fn tmp_is_writable(case: &Case) {
    case.run(&[], "ls -A /tmp; stat -c %a /tmp; echo x > /tmp/x && cat /tmp/x").code(0).says("1777\nx\n");
}

fn devices(case: &Case) {
    let script = "cd /dev; for d in full null random tty urandom zero; do [ -c $d ] || echo no $d; done; \
                  readlink fd stdin; [ -w shm ] || echo shm; [ -e pts ] || echo pts; [ -e ptmx ] || echo ptmx; \
                  ls -A | grep -Ev '^(full|null|random|tty|urandom|zero|fd|stdin|stdout|stderr|shm|pts|ptmx)$'; \
                  echo gone > null; head -c 2 zero | od -An -tx1; mknod /build/n c 1 3 2>/dev/null && echo mknod; :";
    case.run(&[], script).code(0).says("/proc/self/fd\n/proc/self/fd/0\n 00 00\n");
}

fn etc(case: &Case) {
    let script = "ls -A /etc | grep -v alternatives; cat /etc/passwd /etc/group";
    case.run(&[], script).code(0).says(
        "group\nhosts\npasswd\n\
         root:x:0:0:Nix build user:/build:/noshell\n\
         nixbld:x:1000:100:Nix build user:/build:/noshell\n\
         nobody:x:65534:65534:Nobody:/:/noshell\n\
         root:x:0:\nnixbld:!:100:\nnogroup:x:65534:\n",
    );
}

fn environment_is_documented(case: &Case) {
    let help = finish(case.cofferdam(["run", "--help"])).code(0).out();
    let words: BTreeSet<&str> = help.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
    // `env` itself, as no shell adds to what it was given.
    let seen = finish(case.cofferdam(["run", "--host-tools", "--", "/usr/bin/env"])).code(0).out();
    for line in seen.lines() {
        let (name, _) = line.split_once('=').unwrap();
        assert!(words.contains(name), "{line} is in the environment but not in `run --help`");
    }
    assert!(!seen.contains("of the host"), "{seen}");
    assert!(seen.lines().any(|line| line.starts_with("PATH=") && line.contains("/usr/bin")), "{seen}");
}

fn environment_is_what_was_given(case: &Case) {
    let flags = ["--env", "A=1", "--env", "EMPTY=", "--env", "HOME=/mine", "--env", "EQ=a=b c"];
    case.run(&flags, r#"echo "$A,$EMPTY,$HOME,$EQ,${EMPTY+set}""#).code(0).says("1,,/mine,a=b c,set\n");
}

fn umask_and_signals(case: &Case) {
    case.run(&[], "umask; grep -E '^Sig(Blk|Ign):' /proc/self/status")
        .code(0)
        .says("0022\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

fn own_processes_only(case: &Case) {
    // The init, the shell, and the two that list.
    let script = "ls /proc | grep -Ec '^[0-9]+$'; echo $$; kill -0 1 2>/dev/null; readlink /proc/1/exe; :";
    let seen = case.run(&[], script).code(0).out();
    let mut lines = seen.lines();
    let processes: u32 = lines.next().unwrap().parse().unwrap();
    assert!(processes <= 4, "{seen}");
    assert_eq!(lines.next(), Some("2"), "the build is pid 2");
    // What init runs is none of the build's business.
    assert_eq!(lines.next(), None, "{seen}");
}
