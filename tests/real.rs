//! Real input: Lua, which nobody here wrote, compiled in the sandbox, and what came of it run.

use std::path::Path;
use std::process::{Command, ExitCode};

mod support;

use support::case::{Ran, finish, set_mode};
use support::{Case, Facility, Lacking, Mode};

/// The package ships the library without its command; this much of one is enough: `lua -e CODE`.
const MAIN: &str = r#"
#include "lauxlib.h"
#include "lualib.h"

int main(int argc, char **argv)
{
    lua_State *lua = luaL_newstate();
    luaL_openlibs(lua);
    if (argc != 3 || luaL_dostring(lua, argv[2]) != LUA_OK) {
        luaL_traceback(lua, lua, lua_tostring(lua, -1), 0);
        fprintf(stderr, "%s\n", lua_tostring(lua, -1));
        return 1;
    }
    lua_close(lua);
    return 0;
}
"#;

/// Compiles every source, then proves that the result works, in the sandbox.
const COMPILE: &str = "set -e; cd /inputs/lua; gcc -std=gnu99 -O1 -DLUA_USE_POSIX -o /outputs/lua *.c -lm -ldl; \
                       /outputs/lua -e 'print(6 * 7)'";

fn main() -> ExitCode {
    let trials = Mode::ALL.into_iter().flat_map(|mode| {
        [
            support::fallible(format!("lua_with_host_tools::{mode}"), mode, lua_with_host_tools),
            support::fallible(format!("lua_in_a_rootfs::{mode}"), mode, lua_in_a_rootfs),
        ]
    });
    let mut trials: Vec<_> = trials.collect();
    trials.push(support::in_mode("a_static_program_is_a_rootfs", Mode::own(), a_static_program_is_a_rootfs));
    support::run(trials)
}

/// Lua's sources, where every mode can read them.
fn lua(case: &Case) -> Result<(), Lacking> {
    let lacking = |reason: String| Lacking::new(Facility::Sources, reason);
    let fetched = support::script("sources").map_err(lacking)?;
    let package = Path::new(&fetched).join("lua-src");
    let newest = std::fs::read_dir(&package)
        .map_err(|error| lacking(format!("{}: {error}", package.display())))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.join("lvm.c").exists())
        .max()
        .ok_or_else(|| lacking(format!("{}: there is no Lua in it", package.display())))?;
    for entry in std::fs::read_dir(newest).unwrap() {
        let entry = entry.unwrap();
        let name = format!("lua/{}", entry.file_name().display());
        case.write(&name, std::fs::read(entry.path()).unwrap());
    }
    case.write("lua/main.c", MAIN);
    Ok(())
}

/// The Lua that came out runs on the host, and is a Lua.
fn runs_on_the_host(case: &Case) {
    let run = |code: &str| -> Ran {
        let mut command = case.program(case.path("lua-out/lua"));
        command.args(["-e", code]);
        finish(command).code(0)
    };
    run("print(1+1)").says("2\n");
    run("local t = {} for i = 1, 1000 do t[i] = ('x'):rep(i) end print(#table.concat(t))").says("500500\n");
}

fn lua_with_host_tools(case: &Case) -> Result<(), Lacking> {
    lua(case)?;
    case.make_dir("lua-out");
    let flags = ["--input", "lua=lua", "--output", "lua", "--out-dir", "lua-out"];
    case.run(&flags, COMPILE).code(0).says("42\n");
    runs_on_the_host(case);
    Ok(())
}

fn lua_in_a_rootfs(case: &Case) -> Result<(), Lacking> {
    lua(case)?;
    let rootfs = support::script("rootfs").map_err(|reason| Lacking::new(Facility::Debootstrap, reason))?;
    // What is there of the host, by absolute path, must not be there for the build.
    let marker = case.write("host-marker", "of the host");
    let script = format!(
        "test ! -e {} || echo marker; test ! -e {} || echo repository; ls / | tr '\\n' ' '; echo; ls /usr/bin | wc -l; {COMPILE}",
        marker.display(),
        support::repository().display(),
    );
    case.make_dir("lua-out");
    let mut command = case.cofferdam(["run", "--rootfs", &rootfs, "--env", "PATH=/usr/bin:/bin"]);
    command.args(["--input", "lua=lua", "--output", "lua", "--out-dir", "lua-out"]);
    command.args(["--", "/bin/sh", "-c", &script]);
    let ran = finish(command).code(0);
    let said = ran.out();
    let lines: Vec<&str> = said.lines().collect();
    let [root, programs, answer] = lines[..] else { panic!("{ran}") };
    // The tree's own names, and those that every sandbox has.
    let mut expected: Vec<String> = std::fs::read_dir(&rootfs)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        // Builds have none.
        .filter(|name| name != "sys")
        .chain(["build", "dev", "etc", "inputs", "outputs", "proc", "tmp"].map(str::to_owned))
        .collect();
    expected.sort();
    expected.dedup();
    assert_eq!(root.split_whitespace().collect::<Vec<_>>(), expected);
    let in_tree = std::fs::read_dir(Path::new(&rootfs).join("usr/bin")).unwrap().count();
    assert_eq!(programs, in_tree.to_string(), "/usr/bin is the tree's, and whole");
    assert_eq!(answer, "42");
    runs_on_the_host(case);
    Ok(())
}

/// A root of one file: nothing is needed of any Debian, and nothing of the host is there.
fn a_static_program_is_a_rootfs(case: &Case) {
    case.write("main.c", "#include <stdio.h>\nint main(void) { return puts(\"alone\") == EOF; }\n");
    case.make_dir("root/bin");
    let mut gcc = case.program("gcc");
    gcc.args(["-static", "-o", "root/bin/main", "main.c"]);
    finish(gcc).code(0);
    set_mode(&case.path("root/bin/main"), 0o755);
    let alone = |program: &str| -> Command { case.cofferdam(["run", "--rootfs", "root", "--", program]) };
    finish(alone("/bin/main")).code(0).says("alone\n");
    finish(alone("/bin/sh")).code(127).complains("/bin/sh");
}
