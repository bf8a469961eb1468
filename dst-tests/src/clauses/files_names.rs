//! Files: directories, renaming, removing, and what is refused.

use super::streams::{SOON, file_error, fresh_dir, length, odd_name, payload, same_bytes, sh};
use crate::{
    clause,
    clause::{Broken, Clause, Verdict},
    context::Context,
    ensure, ensure_eq,
};
use std::collections::BTreeMap;
use vm_trait::{
    CreateDirOptions, DirEntry, ExecRequest, ExecStatus, FileKind, GuestFileError, RemoveOptions,
    VmErrorKind, VmInstance, VmInstanceExt, VmResult,
};

/// What is promised of names and directories.
pub(super) const CLAUSES: &[Clause] = &[
    clause!(listing_sorted, "files.listing_sorted", "a directory is listed with kinds, sorted by name as bytes",
        [Exec, Files], faults: []),
    clause!(listing_large, "files.listing_large", "a directory of thousands of names is listed whole",
        [Exec, Files], faults: []),
    clause!(create_dir, "files.create_dir", "a directory is made with the permission bits asked for, else 0755",
        [Files], faults: []),
    clause!(create_dir_recursive, "files.create_dir_recursive",
        "missing parents are made when asked for, and doing it again is no error", [Files], faults: []),
    clause!(create_dir_exists, "files.create_dir_exists", "making a directory where something stands is told as such",
        [Files], faults: []),
    clause!(rename_replaces, "files.rename_replaces", "renaming replaces a file and keeps content and permission bits",
        [Files], faults: []),
    clause!(rename_directory, "files.rename_directory", "a directory is renamed with all it holds", [Files], faults: []),
    clause!(rename_refused, "files.rename_refused",
        "renaming what is missing, or over what cannot be replaced, is told as such and changes nothing",
        [Files], faults: []),
    clause!(remove_kinds, "files.remove_kinds",
        "a file, an empty directory and a symbolic link are removed, and a link's target stays",
        [Exec, Files], faults: []),
    clause!(remove_not_empty, "files.remove_not_empty",
        "a directory that holds something is removed only when asked for with all it holds", [Files], faults: []),
    clause!(remove_follows_no_links, "files.remove_follows_no_links",
        "removing a tree never leaves it through symbolic links", [Exec, Files], faults: []),
    clause!(exists_tells, "files.exists_tells", "what stands at a path is told, and that nothing does",
        [Exec, Files], faults: []),
    clause!(not_found, "files.not_found", "what is missing is told as such, by every operation, with its path",
        [Files], faults: []),
    clause!(is_a_directory, "files.is_a_directory", "a directory in place of a file is told as such", [Files], faults: []),
    clause!(not_a_directory, "files.not_a_directory", "a file in place of a directory is told as such",
        [Files], faults: []),
    clause!(paths_refused, "files.paths_refused",
        "paths that are not absolute and normalised are refused by every operation", [Files], faults: []),
    clause!(other_errors, "files.other_errors",
        "a name that is too long is an invalid path, and what has no kind of its own comes with its errno",
        [Exec, Files], faults: []),
];

/// Does one drawn operation on a path, and names it.
async fn any_operation(
    ctx: &Context,
    vm: &dyn VmInstance,
    path: &str,
) -> (&'static str, VmResult<()>) {
    match ctx.draw(0, 6) {
        0 => ("read_file", vm.read_file(path).await.map(drop)),
        1 => ("stat", vm.stat(path).await.map(drop)),
        2 => ("list_dir", vm.list_dir(path).await.map(drop)),
        3 => ("remove", vm.remove(path, RemoveOptions { recursive: ctx.one_in(2) }).await),
        4 => ("rename from", vm.rename(path, &format!("{}/new", ctx.scratch(vm))).await),
        5 => ("write_file", vm.write(path, "text").await),
        _ => ("create_dir", vm.create_dir(path, CreateDirOptions::default()).await),
    }
}

async fn run_ok(vm: &dyn VmInstance, request: ExecRequest) -> Verdict {
    let what = format!("{} {:?}", request.program, request.args);
    let got = vm.exec(request).await?;
    ensure_eq!(got.status, ExecStatus::Exited(0), "{what} said {}", got.stderr_text());
    Ok(())
}

async fn listing_sorted(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    // A map of strings is in the order of their bytes.
    let mut wanted = BTreeMap::new();
    for _ in 0..ctx.draw(0, 25) {
        let name = if ctx.one_in(2) { odd_name(ctx) } else { format!("{:x}", ctx.draw(0, 0x1fff)) };
        if wanted.contains_key(&name) {
            continue;
        }
        let path = format!("{dir}/{name}");
        let kind = ctx.pick(&[FileKind::File, FileKind::Directory, FileKind::Symlink]);
        match kind {
            FileKind::Directory => vm.create_dir_all(&path).await?,
            FileKind::Symlink => {
                run_ok(&*vm, ExecRequest::new("ln").args(["-s", "anywhere", &path])).await?;
            }
            _ => vm.write(&path, payload(ctx, 100)).await?,
        }
        wanted.insert(name, kind);
    }
    let wanted: Vec<_> = wanted.into_iter().map(|(name, kind)| DirEntry::new(name, kind)).collect();
    ensure_eq!(vm.list_dir(&dir).await?, wanted, "the listing");
    Ok(())
}

async fn listing_large(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let count = if ctx.heavy(32) { 2000 } else { ctx.draw(100, 300) };
    // Long names, so that the listing is longer than a frame.
    let padding =
        "n".repeat(if count == 2000 { length(ctx, 140, 200) } else { length(ctx, 0, 150) });
    let mut wanted: Vec<String> = (0..count).map(|index| format!("{padding}{index}")).collect();
    for names in wanted.chunks(200) {
        run_ok(&*vm, ExecRequest::new("mkdir").args(names).cwd(dir.clone())).await?;
    }
    wanted.sort_unstable();
    let listed = ctx.within(SOON, "the listing", vm.list_dir(&dir)).await??;
    let names: Vec<String> = listed.into_iter().map(|entry| entry.name).collect();
    ensure!(names == wanted, "{} names listed of {count}, or in another order", names.len());
    vm.remove_all(&dir).await?;
    ensure!(!vm.exists(&dir).await?, "the directory is still there");
    Ok(())
}

async fn create_dir(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let mode =
        if ctx.one_in(3) { None } else { Some(u32::try_from(ctx.draw(0, 0o777)).unwrap_or(0)) };
    let path = format!("{dir}/{}", odd_name(ctx));
    vm.create_dir(&path, CreateDirOptions { mode, recursive: ctx.one_in(2) }).await?;
    let stat = vm.stat(&path).await?;
    ensure_eq!(stat.kind, FileKind::Directory, "kind");
    let wanted = mode.unwrap_or(0o755);
    ensure_eq!(format!("{:o}", stat.mode), format!("{wanted:o}"), "permission bits");
    let inside = CreateDirOptions::default();
    let orphan = vm.create_dir(&format!("{dir}/missing/{}", odd_name(ctx)), inside).await;
    file_error(orphan, &GuestFileError::NotFound, "a directory without parent")
}

async fn create_dir_recursive(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let mut path = dir;
    for _ in 0..ctx.draw(1, 6) {
        path = format!("{path}/{}", odd_name(ctx));
    }
    let options = CreateDirOptions { recursive: true, ..CreateDirOptions::default() };
    for _ in 0..ctx.draw(1, 3) {
        vm.create_dir(&path, options.clone()).await?;
        ensure_eq!(vm.stat(&path).await?.kind, FileKind::Directory, "kind");
    }
    vm.write(&format!("{path}/file"), "kept").await?;
    vm.create_dir(&path, options).await?;
    ensure_eq!(vm.read_to_string(&format!("{path}/file")).await?, "kept", "a file in it");
    Ok(())
}

async fn create_dir_exists(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/{}", odd_name(ctx));
    let is_file = ctx.one_in(2);
    if is_file {
        vm.write(&path, "text").await?;
    } else {
        vm.create_dir(&path, CreateDirOptions::default()).await?;
    }
    // A directory that is there already is fine for a recursive request, a file is not.
    let recursive = is_file && ctx.one_in(2);
    let again = vm.create_dir(&path, CreateDirOptions { recursive, mode: None }).await;
    file_error(again, &GuestFileError::AlreadyExists, "making it again")?;
    if is_file {
        ensure_eq!(vm.read_to_string(&path).await?, "text", "the file");
    }
    Ok(())
}

async fn rename_replaces(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let (from, to) = (format!("{dir}/from"), format!("{dir}/to"));
    let bytes = payload(ctx, 50_000);
    let mode = u32::try_from(ctx.draw(0, 0o777)).unwrap_or(0) | 0o400;
    vm.write_file(&from, bytes.clone(), vm_trait::WriteOptions { mode: Some(mode) }).await?;
    if ctx.one_in(2) {
        vm.write(&to, payload(ctx, 50_000)).await?;
    }
    vm.rename(&from, &to).await?;
    same_bytes(&vm.read_file(&to).await?, &bytes, "the content")?;
    ensure_eq!(format!("{:o}", vm.stat(&to).await?.mode), format!("{mode:o}"), "permission bits");
    file_error(vm.stat(&from).await, &GuestFileError::NotFound, "the old name")
}

async fn rename_directory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let (from, to) = (format!("{dir}/from"), format!("{dir}/to"));
    vm.create_dir_all(&format!("{from}/inner")).await?;
    let name = odd_name(ctx);
    vm.write(&format!("{from}/inner/{name}"), "kept").await?;
    if ctx.one_in(2) {
        // An empty directory is replaced.
        vm.create_dir_all(&to).await?;
    }
    vm.rename(&from, &to).await?;
    ensure_eq!(vm.read_to_string(&format!("{to}/inner/{name}")).await?, "kept", "a file in it");
    ensure!(!vm.exists(&from).await?, "the old name is still there");
    Ok(())
}

async fn rename_refused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let at = |name: &str| format!("{dir}/{name}");
    vm.create_dir_all(&at("full")).await?;
    vm.write(&at("full/file"), "inner").await?;
    vm.create_dir_all(&at("empty")).await?;
    vm.write(&at("file"), "outer").await?;
    let before = vm.list_dir(&dir).await?;
    let (from, to, wanted) = ctx.pick(&[
        ("missing", "file", GuestFileError::NotFound),
        ("file", "missing/file", GuestFileError::NotFound),
        ("empty", "full", GuestFileError::DirectoryNotEmpty),
        ("file", "full", GuestFileError::IsADirectory),
        ("file", "empty", GuestFileError::IsADirectory),
        ("full", "file", GuestFileError::NotADirectory),
        ("file", "file/inner", GuestFileError::NotADirectory),
        ("full", "full/inner", GuestFileError::Io { errno: 22 }),
    ]);
    file_error(vm.rename(&at(from), &at(to)).await, &wanted, &format!("renaming {from} to {to}"))?;
    ensure_eq!(vm.list_dir(&dir).await?, before, "the directory afterwards");
    ensure_eq!(vm.read_to_string(&at("file")).await?, "outer", "the file");
    ensure_eq!(vm.read_to_string(&at("full/file")).await?, "inner", "the file in the directory");
    Ok(())
}

async fn remove_kinds(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let at = |name: &str| format!("{dir}/{name}");
    vm.create_dir_all(&at("target")).await?;
    vm.write(&at("target/file"), "kept").await?;
    vm.create_dir_all(&at("empty")).await?;
    vm.write(&at("file"), payload(ctx, 100)).await?;
    let links = sh("ln -s target link; ln -s nowhere loose", [""; 0]).cwd(dir.clone());
    run_ok(&*vm, links).await?;
    let recursive = ctx.one_in(2);
    for name in ["empty", "file", "link", "loose"] {
        vm.remove(&at(name), RemoveOptions { recursive }).await?;
        file_error(vm.stat(&at(name)).await, &GuestFileError::NotFound, name)?;
    }
    ensure_eq!(vm.read_to_string(&at("target/file")).await?, "kept", "the link's target");
    Ok(())
}

async fn remove_not_empty(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let tree = format!("{dir}/tree");
    let mut inner = tree.clone();
    for _ in 0..ctx.draw(0, 5) {
        inner = format!("{inner}/{}", odd_name(ctx));
    }
    vm.create_dir_all(&inner).await?;
    let file = format!("{inner}/{}", odd_name(ctx));
    vm.write(&file, "text").await?;
    let refused = vm.remove(&tree, RemoveOptions::default()).await;
    file_error(refused, &GuestFileError::DirectoryNotEmpty, "removing it alone")?;
    ensure_eq!(vm.read_to_string(&file).await?, "text", "what it holds after the refusal");
    vm.remove_all(&tree).await?;
    ensure_eq!(vm.list_dir(&dir).await?, Vec::new(), "what is left");
    Ok(())
}

async fn remove_follows_no_links(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let outside = format!("{dir}/outside");
    vm.create_dir_all(&format!("{outside}/inner")).await?;
    vm.write(&format!("{outside}/inner/file"), "kept").await?;
    let tree = format!("{dir}/tree");
    let script = ctx.pick(&[
        "mkdir -p tree; ln -s ../outside tree/link",
        "mkdir -p tree/deep; ln -s \"$1\" tree/deep/link; ln -s ../../outside/inner/file tree/deep/file",
        "mkdir -p tree; ln -s .. tree/up; ln -s . tree/self",
    ]);
    run_ok(&*vm, sh(script, [outside.clone()]).cwd(dir)).await?;
    vm.remove_all(&tree).await?;
    ensure!(!vm.exists(&tree).await?, "the tree is still there");
    let kept = vm.read_to_string(&format!("{outside}/inner/file")).await?;
    ensure_eq!(kept, "kept", "the file outside");
    Ok(())
}

async fn exists_tells(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let name = odd_name(ctx);
    let path = format!("{dir}/{name}");
    ensure!(!vm.exists(&path).await?, "something stands at a new path");
    match ctx.draw(0, 2) {
        0 => vm.write(&path, "").await?,
        1 => vm.create_dir_all(&path).await?,
        _ => run_ok(&*vm, ExecRequest::new("ln").args(["-s", "nowhere", &path])).await?,
    }
    ensure!(vm.exists(&path).await?, "nothing stands at the path");
    ensure!(!vm.exists(&format!("{path}/{name}")).await?, "something stands below it");
    vm.remove_all(&path).await?;
    ensure!(!vm.exists(&path).await?, "something stands at the path after it was removed");
    Ok(())
}

async fn not_found(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/missing/{}", odd_name(ctx));
    let (operation, result) = any_operation(ctx, &*vm, &path).await;
    match result {
        Err(error) => match error.kind() {
            VmErrorKind::GuestFile { path: named, error: GuestFileError::NotFound } => {
                ensure_eq!(*named, path, "the path that {operation} names");
                Ok(())
            }
            _ => Err(Broken::new(format!("{operation} on a missing path: {error}"))),
        },
        Ok(()) => Err(Broken::new(format!("{operation} on a missing path: got Ok"))),
    }
}

async fn is_a_directory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let path = format!("{dir}/{}", odd_name(ctx));
    vm.create_dir_all(&path).await?;
    let wanted = GuestFileError::IsADirectory;
    file_error(vm.read_file(&path).await, &wanted, "reading a directory")?;
    file_error(vm.write(&path, payload(ctx, 9000)).await, &wanted, "writing to a directory")?;
    ensure_eq!(vm.list_dir(&dir).await?.len(), 1, "names beside it");
    ensure_eq!(vm.list_dir(&path).await?, Vec::new(), "names in it");
    Ok(())
}

async fn not_a_directory(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let file = format!("{dir}/{}", odd_name(ctx));
    vm.write(&file, "text").await?;
    let wanted = GuestFileError::NotADirectory;
    file_error(vm.list_dir(&file).await, &wanted, "listing a file")?;
    let below = format!("{file}/{}", odd_name(ctx));
    let (operation, result) = any_operation(ctx, &*vm, &below).await;
    file_error(result, &wanted, &format!("{operation} below a file"))?;
    ensure_eq!(vm.read_to_string(&file).await?, "text", "the file");
    Ok(())
}

async fn paths_refused(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let name = odd_name(ctx);
    let path = ctx.pick(&[
        String::new(),
        name.clone(),
        format!("./{name}"),
        "..".to_owned(),
        format!("{dir}/../{name}"),
        format!("{dir}/./{name}"),
        format!("{dir}//{name}"),
        format!("{dir}/{name}/"),
        format!("/{dir}/{name}"),
        format!("{dir}/.."),
        format!("{dir}/."),
        format!("{dir}/a\0b"),
    ]);
    let (operation, result) = any_operation(ctx, &*vm, &path).await;
    file_error(result, &GuestFileError::InvalidPath, &format!("{operation} on {path:?}"))?;
    let target = vm.rename(&format!("{dir}/file"), &path).await;
    file_error(target, &GuestFileError::InvalidPath, &format!("renaming to {path:?}"))?;
    ensure_eq!(vm.list_dir(&dir).await?, Vec::new(), "what the refused operations left");
    Ok(())
}

async fn other_errors(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    let dir = fresh_dir(ctx, &*vm).await?;
    let (path, wanted) = if ctx.one_in(2) {
        let name = "n".repeat(length(ctx, 256, 5000));
        (format!("{dir}/{name}"), GuestFileError::InvalidPath)
    } else {
        run_ok(&*vm, sh("ln -s b a; ln -s a b", [""; 0]).cwd(dir.clone())).await?;
        (format!("{dir}/a/{}", odd_name(ctx)), GuestFileError::Io { errno: 40 })
    };
    let (operation, result) = any_operation(ctx, &*vm, &path).await;
    file_error(result, &wanted, &format!("{operation} on {path:?}"))
}
