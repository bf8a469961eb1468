//! `exec`: what a program is started with, and why it may not be started.

use super::{
    probe::order,
    streams::{
        SOON, break_link, disturb_link, exec_failure, fresh_dir, length, odd_name, refused_field,
        running_with, same_bytes, sh,
    },
};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use std::collections::BTreeMap;
use vm_core::fault::{FaultKind, FaultOrder};
use vm_trait::{
    ExecFailure, ExecRequest, ExecStatus, User, VmConfig, VmInstance, VmInstanceExt, WriteOptions,
};

/// What `exec` promises of how programs are started.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(arguments_arrive, "exec.arguments_arrive",
        "arguments arrive as given: spaces, newlines, empty strings, any UTF-8", [Exec], faults: []),
    clause!(no_shell, "exec.no_shell", "no shell reads the arguments: `$HOME`, `*` and `;` stay as they are",
        [Exec], faults: []),
    clause!(environment_exact, "exec.environment_exact",
        "the environment is the VM's and the request's, the request's first, and nothing else", [Exec], faults: []),
    clause!(environment_text, "exec.environment_text", "a variable's value arrives byte for byte", [Exec], faults: []),
    clause!(working_directory, "exec.working_directory",
        "a program starts in the directory asked for, else in `/`", [Exec, Files], faults: []),
    clause!(bad_working_directory, "exec.bad_working_directory",
        "a working directory that is missing or no directory is told as such, a relative one refused",
        [Exec, Files], faults: []),
    clause!(user_by_number, "exec.user_by_number", "a program runs as the user and group given by number",
        [Exec, Users], faults: []),
    clause!(user_by_name, "exec.user_by_name", "a program runs as the user of that name in /etc/passwd, with its group",
        [Exec, Files, Users], faults: []),
    clause!(unknown_user, "exec.unknown_user", "a user who does not exist is told as such", [Exec, Users], faults: []),
    clause!(path_of_request, "exec.path_of_request", "a program's name is looked for in the request's PATH, in its order",
        [Exec, Files], faults: []),
    clause!(program_not_found, "exec.program_not_found", "a program that does not exist is told as such",
        [Exec, Files], faults: []),
    clause!(not_executable, "exec.not_executable",
        "a file without permission to execute and a directory are told as not executable", [Exec, Files], faults: []),
    clause!(bad_request, "exec.bad_request",
        "an empty program, a NUL byte and a time limit of zero are refused with the field's name", [Exec], faults: []),
    clause!(out_of_processes, "exec.out_of_processes",
        "a guest without processes left is told as such, and nothing is left of the attempt", [Exec],
        faults: [SpawnFail]),
    clause!(runs_once, "exec.runs_once", "a program runs once and only once, also when the link breaks under the request",
        [Exec, Files], faults: [LinkDisconnect]),
];

async fn arguments_arrive(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let mut args: Vec<String> = (0..ctx.draw(1, 20)).map(|_| ctx.text(40)).collect();
    if ctx.one_in(2) {
        let at = ctx.index(args.len());
        args[at] = ctx.pick(&["", " ", "\n", "--", "-n", "\u{1f980}\n\u{4e2d}"]).to_owned();
    }
    if ctx.one_in(4) {
        args.push("x".repeat(length(ctx, 1, 100_000)));
    }
    let trouble = disturb_link(ctx, &*vm, 0)?;
    let got = vm.exec(sh("printf '%s\\0' \"$@\"", args.clone())).await?;
    let wanted: String = args.iter().flat_map(|arg| [arg.as_str(), "\0"]).collect();
    same_bytes(&got.stdout, wanted.as_bytes(), &format!("the arguments {args:?}"))?;
    ensure_eq!(got.status, ExecStatus::Exited(0), "status");
    trouble.took_place(ctx)
}

async fn no_shell(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let tempting = [
        "$HOME", "*", "; exit 9", "`pwd`", "$(pwd)", "~", "a  b", "'q'", "\\n", "> /x", "&&",
        "{a,b}", "#",
    ];
    let args: Vec<&str> = (0..ctx.draw(1, 8)).map(|_| ctx.pick(&tempting)).collect();
    let got = vm.exec(ExecRequest::new("printf").arg("%s|").args(args.clone())).await?;
    let wanted: String = args.iter().flat_map(|arg| [*arg, "|"]).collect();
    same_bytes(&got.stdout, wanted.as_bytes(), "the arguments")
}

fn variables(ctx: &Context, prefix: &str) -> BTreeMap<String, String> {
    let value = || ctx.text(20).replace('\n', "");
    (0..ctx.draw(0, 5)).map(|index| (format!("{prefix}_{index}"), value())).collect()
}

async fn environment_exact(ctx: &Context) -> Verdict {
    let of_vm = variables(ctx, "SHARED");
    let mut of_request = variables(ctx, "OWN");
    // Some names are in both; the request's value counts.
    for name in of_vm.keys() {
        if ctx.one_in(2) {
            of_request.insert(name.clone(), format!("mine {}", ctx.draw(0, 99)));
        }
    }
    let config = of_vm.iter().fold(VmConfig::builder(), |config, (k, v)| config.with_env(k, v));
    let vm = running_with(ctx, config.build()?).await?;
    let request =
        of_request.iter().fold(ExecRequest::new("env"), |request, (k, v)| request.env(k, v));
    let got = vm.exec(request).await?;
    let mut wanted = of_vm;
    wanted.extend(of_request);
    let text = got.stdout_text();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    let mut wanted: Vec<String> = wanted.iter().map(|(k, v)| format!("{k}={v}")).collect();
    wanted.sort_unstable();
    ensure_eq!(lines, wanted, "the environment");
    Ok(())
}

async fn environment_text(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let value = ctx.text(200);
    let request = sh("printf %s \"$ODD\"", [""; 0]).env("ODD", value.clone());
    let got = vm.exec(request).await?;
    same_bytes(&got.stdout, value.as_bytes(), "the value")
}

async fn working_directory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let got = vm.run("pwd", []).await?;
    ensure_eq!(got.stdout_text(), "/\n", "the directory when none was asked for");
    let dir = format!("{}/{}", fresh_dir(ctx, &*vm).await?, odd_name(ctx));
    vm.create_dir_all(&dir).await?;
    let script = "pwd; echo here > made";
    let got = vm.exec(sh(script, [""; 0]).cwd(dir.clone())).await?;
    same_bytes(&got.stdout, format!("{dir}\n").as_bytes(), "the directory")?;
    ensure_eq!(vm.read_to_string(&format!("{dir}/made")).await?, "here\n", "a relative path there");
    Ok(())
}

async fn bad_working_directory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let file = format!("{dir}/file");
    vm.write(&file, "text").await?;
    let run = |cwd: &str| vm.exec(ExecRequest::new("pwd").cwd(cwd));
    let bad = ExecFailure::BadWorkingDirectory;
    let missing = format!("{dir}/{}x", odd_name(ctx));
    match ctx.draw(0, 2) {
        0 => exec_failure(run(&missing).await, &bad, "a missing directory"),
        1 => exec_failure(run(&file).await, &bad, "a file as directory"),
        _ => {
            let relative = ctx.pick(&["tmp", ".", "..", "./tmp", ""]);
            refused_field(
                run(relative).await,
                "cwd",
                &format!("the relative directory {relative:?}"),
            )
        }
    }
}

async fn ids_as(vm: &dyn VmInstance, user: User) -> Result<String, Broken> {
    let got = vm.exec(sh("id -u; id -g", [""; 0]).user(user)).await?;
    ensure_eq!(
        got.status,
        ExecStatus::Exited(0),
        "status of `id`, which wrote {}",
        got.stderr_text()
    );
    Ok(got.stdout_text())
}

async fn user_by_number(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let draw = || u32::try_from(ctx.draw(0, 60_000)).unwrap_or(0);
    let (uid, gid) = (draw(), draw());
    let ids = ids_as(&*vm, User::Ids { uid, gid }).await?;
    ensure_eq!(ids, format!("{uid}\n{gid}\n"), "user and group");
    Ok(())
}

async fn user_by_name(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let passwd = vm.read_to_string("/etc/passwd").await?;
    let users: Vec<Vec<&str>> = passwd
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| fields.len() == 7)
        .collect();
    ensure!(!users.is_empty(), "/etc/passwd names nobody");
    let fields = ctx.pick(&users);
    let ids = ids_as(&*vm, User::Name(fields[0].to_owned())).await?;
    ensure_eq!(ids, format!("{}\n{}\n", fields[2], fields[3]), "user and group of {}", fields[0]);
    Ok(())
}

async fn unknown_user(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let name = format!("nobody-{:x}{}", ctx.draw(0, u64::MAX), ctx.pick(&["", ":0", " "]));
    let result = vm.exec(ExecRequest::new("true").user(User::Name(name.clone()))).await;
    exec_failure(result, &ExecFailure::UnknownUser, &format!("running as {name:?}"))
}

/// Writes a script that says `text`.
async fn install(vm: &dyn VmInstance, path: &str, text: &str) -> Verdict {
    let script = format!("#!/bin/sh\necho {text}\n");
    let options = WriteOptions { mode: Some(0o755) };
    Ok(vm.write_file(path, script.into(), options).await?)
}

async fn path_of_request(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let name = format!("tool{}", ctx.draw(0, 9));
    let (mut first, mut unusable) = (None, false);
    for place in 0..3 {
        let file = format!("{dir}/{place}/{name}");
        vm.create_dir_all(&format!("{dir}/{place}")).await?;
        if ctx.one_in(3) {
            install(&*vm, &file, &place.to_string()).await?;
            first = first.or(Some(place));
        } else if ctx.one_in(2) {
            // A file that cannot be executed does not end the search.
            vm.write(&file, "no program").await?;
            unusable = true;
        }
    }
    let path = format!("{dir}/0:{dir}/1:{dir}/missing:{dir}/2");
    let result = vm.exec(ExecRequest::new(name.clone()).env("PATH", path)).await;
    match first {
        Some(first) => ensure_eq!(result?.stdout_text(), format!("{first}\n"), "the first in PATH"),
        None if unusable => {
            exec_failure(result, &ExecFailure::NotExecutable, "no program in PATH")?;
        }
        None => exec_failure(result, &ExecFailure::NotFound, "nothing in PATH")?,
    }
    let nowhere = ExecRequest::new("sh").env("PATH", format!("{dir}/missing"));
    exec_failure(vm.exec(nowhere).await, &ExecFailure::NotFound, "sh, outside the request's PATH")
}

async fn program_not_found(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    vm.write(&format!("{dir}/file"), "text").await?;
    let odd = format!("{}-{:x}", odd_name(ctx), ctx.draw(0, u64::MAX));
    let program = match ctx.draw(0, 2) {
        0 => odd,
        1 => format!("{dir}/{odd}"),
        _ => format!("{dir}/missing/{odd}"),
    };
    let result = vm.exec(ExecRequest::new(program.clone())).await;
    exec_failure(result, &ExecFailure::NotFound, &format!("running {program:?}"))
}

async fn not_executable(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let program = if ctx.one_in(3) {
        dir
    } else {
        let file = format!("{dir}/file");
        let mode = u32::try_from(ctx.draw(0, 0o777)).unwrap_or(0) & !0o111;
        let options = WriteOptions { mode: Some(mode) };
        vm.write_file(&file, "#!/bin/sh\nexit 0\n".into(), options).await?;
        file
    };
    let result = vm.exec(ExecRequest::new(program.clone())).await;
    exec_failure(result, &ExecFailure::NotExecutable, &format!("running {program:?}"))
}

async fn bad_request(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let (request, field) = match ctx.draw(0, 6) {
        0 => (ExecRequest::new(""), "program"),
        1 => (ExecRequest::new("tr\0ue"), "program"),
        2 => (sh("true", [ctx.text(5), "a\0b".to_owned()]), "args"),
        3 => (ExecRequest::new("env").env("NAME", "va\0lue"), "env"),
        4 => (ExecRequest::new("env").env(ctx.pick(&["A=B", "", "A\0"]), "value"), "env"),
        5 => (ExecRequest::new("true").cwd("/tm\0p"), "cwd"),
        _ => (ExecRequest::new("true").timeout(std::time::Duration::ZERO), "timeout"),
    };
    let what = format!("{request:?}");
    if ctx.one_in(2) {
        refused_field(vm.exec(request).await, field, &what)?;
    } else {
        refused_field(vm.spawn(request).await, field, &what)?;
    }
    ensure!(vm.processes().await?.is_empty(), "a process is left of a refused request");
    Ok(())
}

async fn out_of_processes(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let trouble = order(ctx, FaultOrder::next(FaultKind::SpawnFail).on(vm.id()))?;
    let result = if ctx.one_in(2) {
        vm.exec(ExecRequest::new("true")).await.map(drop)
    } else {
        vm.spawn(ExecRequest::new("true").open_stdin()).await.map(drop)
    };
    exec_failure(result, &ExecFailure::OutOfResources, "starting a program")?;
    trouble.must_have_fired(ctx)?;
    ensure!(vm.processes().await?.is_empty(), "a process is left of a failed start");
    let got = vm.run("true", []).await?;
    ensure!(got.status.success(), "the next program: {got:?}");
    Ok(())
}

async fn runs_once(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let log = format!("{}/log", fresh_dir(ctx, &*vm).await?);
    for round in 1..=ctx.draw(1, 4) {
        let trouble = break_link(ctx, &*vm, FaultKind::LinkDisconnect, 0)?;
        let running =
            vm.exec(sh("echo ran >> \"$1\"; echo \"$2\"", [log.clone(), round.to_string()]));
        let got = ctx.within(SOON, "a program under a breaking link", running).await??;
        ensure_eq!(got.stdout_text(), format!("{round}\n"), "its output");
        let lines = vm.read_to_string(&log).await?.lines().count();
        ensure_eq!(u64::try_from(lines).unwrap_or(0), round, "how often it ran");
        trouble.took_place(ctx)?;
    }
    Ok(())
}
