//! What sessions came to, as files: pages, JUnit's XML, and the shards of many machines put together.

use roxmltree::{Document, Node};
use serde_json::Value;
use std::{path::PathBuf, sync::Arc, time::Duration};
use vm_core::{
    fault::{FaultKind, FaultOrder},
    timeline::Mark,
};
use vm_dst::{
    clause,
    clause::{Clause, Verdict},
    context::Context,
    ensure,
    environment::Environment,
    merge::{self, Difference, MergeError, Part},
    plan::Plan,
    record::SecondRun,
    report::{html, junit},
    runner::Session,
    seeds::{SeedSource, Seeds},
    shard::Shard,
    summary::Summary,
    target::{Detail, KvmTarget, RunReport, SimTarget, Target, TokioTarget},
};
use vm_trait::{
    Capabilities, Capability, ExecRequest, ForkOptions, RestoreOptions, SnapshotOptions,
    VmInstanceExt,
};

mod lying;

/// What ends elements, comments, strings and attributes, and characters that XML has not.
const HOSTILE: &str = "</script><script>window.broken_out = 1</script><img src=x onerror='window.broken_out = 2'>\
    -->]]>\"'&amp;{data}{nonce}\u{0}\u{1b}[31m\u{8}\u{fffe}\u{2028}é";

async fn breaks_after_much(ctx: &Context) -> Verdict {
    let vm = ctx.running().await?;
    vm.write("/tmp/greeting", "hello").await?;
    vm.run("echo", ["hello", "world"]).await?;
    ctx.fault(FaultOrder::next(FaultKind::LinkDisconnect).on(vm.id()))?;
    let _ = vm.run("cat", ["/tmp/greeting"]).await;
    let slow = vm.exec(ExecRequest::new("sleep").args(["10"]).timeout(Duration::from_secs(1)));
    let _ = futures_util::join!(slow, vm.read_to_string("/there/is/none"));
    vm.pause().await?;
    let snapshot = vm.snapshot(SnapshotOptions::default()).await?;
    vm.resume().await?;
    let copy = ctx.backend().restore(&snapshot, RestoreOptions::running()).await?;
    let children = vm.fork(ForkOptions::new(1)).await?;
    copy.run("echo", [HOSTILE.replace('\0', "").as_str()]).await?;
    ctx.fault(FaultOrder::next(FaultKind::GuestPanic).on(vm.id()))?;
    vm.wait().await;
    copy.kill().await?;
    drop(children);
    ensure!(ctx.seed() > 1 << 60, "the guest said {HOSTILE}");
    Ok(())
}

async fn kept(ctx: &Context) -> Verdict {
    ctx.running().await?.run("echo", ["hello"]).await?;
    Ok(())
}

static BREAKS: Clause =
    clause!(breaks_after_much, "test.breaks_after_much", "<b>never</b> breaks", [], faults: []);
static KEPT: Clause = clause!(kept, "test.kept", "is kept", [], faults: []);

fn session(target: Arc<dyn Target>, clauses: &[&'static Clause], seeds: u64) -> Session {
    let plan = Plan { clauses: clauses.to_vec(), ignored: Vec::new() };
    let mut session =
        Session::new(target, plan, Seeds::range(0, seeds, SeedSource::Option).unwrap());
    session.record = true;
    session
}

fn simulator() -> Arc<dyn Target> {
    Arc::new(SimTarget::new(Environment::best()))
}

fn liar() -> Arc<dyn Target> {
    let made = || async { lying::backend(Some(Capability::Files)) };
    Arc::new(TokioTarget::new("liar", Capabilities::default(), made))
}

/// A run that fails on two backends, and one that has nothing to run on.
fn failing() -> Vec<Summary> {
    let lies = Plan::of(&*liar(), &[]);
    let mut absent = Session::new(
        Arc::new(
            TokioTarget::new("absent", Capabilities::default(), || async { lying::backend(None) })
                .with_fit(|| Err(format!("no machine <i>here</i> {HOSTILE}"))),
        ),
        Plan::default(),
        Seeds::one(0, SeedSource::Option),
    );
    absent.plan = Plan::of(&*absent.target, &[]);
    let mut lying = session(liar(), &lies.clauses, 1);
    lying.plan.ignored = lies.ignored;
    let all = vm_dst::clauses::all().filter(|clause| clause.id.starts_with("chaos"));
    let clauses: Vec<_> = [&BREAKS, &KEPT].into_iter().chain(all).collect();
    [session(simulator(), &clauses, 4), lying, absent]
        .map(|session| session.run(&mut |_| {}))
        .into()
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Leaves a page for `tests/report/browser`, which looks at it in a real browser.
#[test]
fn what_failed_is_shown_with_what_happened_and_nothing_becomes_markup() {
    let summaries = failing();
    let failure = &summaries[0].failures[0];
    assert!(failure.broken.contains(HOSTILE));
    let record = failure.record.as_ref().unwrap();
    assert_eq!(record.second, Some(SecondRun::Broken(failure.broken.clone())));
    let has = |wanted: fn(&Mark) -> bool| record.lines.iter().any(|line| wanted(&line.mark));
    assert!(has(|mark| matches!(mark, Mark::Frame { .. })));
    assert!(has(|mark| *mark == Mark::Fault { fault: FaultKind::GuestPanic }));
    assert!(has(|mark| *mark == Mark::Ordered { fault: FaultKind::LinkDisconnect }));
    assert!(has(|mark| matches!(mark, Mark::State { to, .. } if to == "crashed")));
    let vms: std::collections::BTreeSet<_> = record.lines.iter().filter_map(|it| it.vm).collect();
    assert_eq!(vms.len(), 3);

    let page = html::page(&summaries).unwrap();
    assert_eq!(page.matches("</script>").count(), 2, "its data and its script");
    assert_eq!(page, html::page(&summaries).unwrap());
    let (_, data) = page.split_once("<script type=\"application/json\"").unwrap();
    let data = data.split_once('>').unwrap().1.split_once("</script>").unwrap().0;
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(data[0]["failures"][0]["broken"], failure.broken.as_str());
    std::fs::write(file("report.html"), page).unwrap();
}

#[test]
fn only_failures_are_recorded_and_only_if_asked_for() {
    let mut session = session(simulator(), &[&KEPT, &BREAKS], 3);
    session.record = false;
    let plain = session.run(&mut |_| {});
    assert!(plain.failures.iter().all(|failure| failure.record.is_none()));
    session.record = true;
    let recorded = session.run(&mut |_| {});
    assert_eq!((plain.failed, recorded.failed), (3, 3));
    assert!(recorded.failures.iter().all(|failure| failure.record.is_some()));
    assert_eq!(fingerprints(&plain), fingerprints(&recorded));
    assert_eq!(recorded.faults_ordered[&FaultKind::LinkDisconnect], 3);
}

#[test]
fn what_a_second_run_came_to_is_told() {
    /// Breaks its promise the first time.
    #[derive(Debug, Default)]
    struct Fickle(std::sync::atomic::AtomicBool);
    impl Target for Fickle {
        fn name(&self) -> &str {
            "fickle"
        }
        fn capabilities(&self) -> Capabilities {
            Capabilities::default()
        }
        fn environment(&self) -> &str {
            "none"
        }
        fn run(&self, _: &'static Clause, _: u64, _: Detail) -> RunReport {
            let again = self.0.swap(true, std::sync::atomic::Ordering::Relaxed);
            RunReport { broken: (!again).then(|| "once".to_owned()), ..RunReport::default() }
        }
    }
    let summary = session(Arc::new(Fickle::default()), &[&KEPT], 1).run(&mut |_| {});
    let record = summary.failures[0].record.as_ref().unwrap();
    assert_eq!(record.second, Some(SecondRun::Kept));
}

#[test]
fn junit_has_every_clause_and_is_xml_whatever_was_said() {
    let summaries = failing();
    let text = junit::document(&summaries).unwrap();
    let document = Document::parse(&text).unwrap();
    let children = |node: Node<'_, '_>, name: &str| {
        node.descendants().filter(|child| child.has_tag_name(name)).count()
    };
    let suites: Vec<_> =
        document.descendants().filter(|node| node.has_tag_name("testsuite")).collect();
    assert_eq!(suites.len(), 3);
    for (suite, summary) in suites.iter().zip(&summaries) {
        assert_eq!(suite.attribute("name"), Some(summary.backend.as_str()));
        assert_eq!(children(*suite, "testcase"), summary.per_clause.len());
        let failed = summary.per_clause.iter().filter(|clause| clause.failed > 0).count();
        assert_eq!(children(*suite, "failure"), failed);
        assert_eq!(u64::try_from(children(*suite, "skipped")).unwrap(), summary.ignored);
    }
    let failure = document.descendants().find(|node| node.has_tag_name("failure")).unwrap();
    let said = failure.text().unwrap();
    assert!(said.contains("</script><script>window.broken_out = 1</script>"), "{said}");
    assert!(said.contains("replay") && said.contains("--seed 0x0"), "{said}");
    let skipped = document.descendants().find(|node| node.has_tag_name("skipped")).unwrap();
    assert!(skipped.attribute("message").is_some_and(|reason| !reason.is_empty()));
}

/// Clauses of the registry that are quick, so that reports of them can be read back.
fn quick() -> Vec<&'static Clause> {
    let groups = ["exec", "chaos", "pause"];
    vm_dst::clauses::all().filter(|clause| groups.contains(&clause.group())).collect()
}

fn shard(index: u64, of: u64, seeds: u64) -> Part {
    let mut session = session(simulator(), &quick(), seeds);
    session.shard = Shard::new(index, of).unwrap();
    let summary = session.run(&mut |_| {});
    assert_eq!(summary.runs, session.runs());
    // As it comes from another machine.
    let json = serde_json::to_string(&summary).unwrap();
    Part { name: format!("{index}.json"), summary: serde_json::from_str(&json).unwrap() }
}

fn fingerprints(summary: &Summary) -> Vec<(&'static str, Option<vm_dst::summary::Fingerprints>)> {
    summary.per_clause.iter().map(|clause| (clause.id, clause.fingerprints)).collect()
}

#[test]
fn four_shards_are_the_whole() {
    let whole = shard(1, 1, 7).summary;
    let parts: Vec<_> = [3, 1, 4, 2].map(|index| shard(index, 4, 7)).into();
    assert!(parts.iter().all(|part| part.summary.runs < whole.runs / 3));
    let merged = merge::merge(parts).unwrap();
    let [merged] = &merged[..] else { panic!("one session") };
    assert!(fingerprints(&whole).iter().all(|(_, sum)| sum.is_some()));
    assert_eq!(fingerprints(merged), fingerprints(&whole));
    // All but the times taken.
    let timeless = |summary: &Summary| {
        let mut summary = summary.clone();
        summary.seconds = 0.0;
        summary.per_clause.iter_mut().for_each(|clause| clause.seconds = 0.0);
        serde_json::to_value(summary).unwrap()
    };
    assert_eq!(timeless(merged), timeless(&whole));
    assert!(merged.faults_fired.values().any(|times| *times > 0));
}

#[test]
fn failures_and_their_records_survive_the_merge() {
    let broken = |index| {
        let mut part = shard(index, 2, 2);
        let clause = part.summary.per_clause[0].clone();
        let record =
            session(simulator(), &[&BREAKS], 1).run(&mut |_| {}).failures[0].record.clone();
        part.summary.failed = 1;
        part.summary.failures.push(vm_dst::summary::Failure {
            clause: clause.id,
            promise: clause.promise,
            seed: 2 - index,
            broken: HOSTILE.to_owned(),
            replay: String::new(),
            record,
        });
        let json = serde_json::to_string(&part.summary).unwrap();
        Part { summary: serde_json::from_str(&json).unwrap(), ..part }
    };
    let merged = merge::merge(vec![broken(1), broken(2)]).unwrap().remove(0);
    assert_eq!(merged.failures.iter().map(|failure| failure.seed).collect::<Vec<_>>(), [0, 1]);
    assert!(merged.failures.iter().all(|it| it.broken == HOSTILE && it.record.is_some()));
    assert!(!merged.passed());
}

#[test]
fn shards_that_do_not_fit_are_refused() {
    let parts: Vec<_> = (1..=3).map(|index| shard(index, 3, 2)).collect();
    let put = |parts: &[&Part]| merge::merge(parts.iter().map(|part| Part::clone(part)).collect());
    let [one, two, three] = &parts[..] else { unreachable!() };
    assert!(put(&[one, two, three]).is_ok());
    assert!(matches!(put(&[]), Err(MergeError::None)));
    assert!(
        matches!(put(&[one, three]), Err(MergeError::Missing { missing, of: 3, .. }) if missing == [2])
    );
    assert!(matches!(
        put(&[one, two, two, three]),
        Err(MergeError::Doubled { shard, .. }) if shard.index() == 2
    ));
    let differs = |change: &dyn Fn(&mut Summary), wanted: Difference| {
        let mut other = two.clone();
        change(&mut other.summary);
        match put(&[one, &other, three]) {
            Err(MergeError::Differ { first, second, what }) => {
                assert_eq!((first.as_str(), second.as_str(), what), ("1.json", "2.json", wanted));
            }
            other => panic!("{other:?}"),
        }
    };
    differs(&|it| it.shard = Shard::new(2, 4).unwrap(), Difference::Shards);
    differs(&|it| it.seeds = 3, Difference::Seeds);
    differs(&|it| it.first_seed = 9, Difference::Seeds);
    differs(&|it| it.twice = true, Difference::Twice);
    differs(&|it| drop(it.per_clause.pop()), Difference::Clauses);
    differs(&|it| it.per_clause[0].ignored = Some("not here".to_owned()), Difference::Clauses);
    differs(&|it| it.faults_fired.clear(), Difference::Faults);
    // Another backend is shown beside it, and has to be whole itself.
    let mut other = one.clone();
    other.summary.backend = "other".to_owned();
    assert!(matches!(put(&[one, two, three, &other]), Err(MergeError::Missing { .. })));
    other.summary.shard = Shard::WHOLE;
    assert_eq!(put(&[one, two, three, &other]).unwrap().len(), 2);
    // A part that was interrupted makes the whole an interrupted one.
    let mut cut = two.clone();
    cut.summary.interrupted = true;
    assert!(put(&[one, &cut, three]).unwrap()[0].interrupted);
}

#[test]
fn files_that_are_no_reports_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("report.json");
    assert!(matches!(merge::read(&[path.clone()]), Err(MergeError::Unreadable { .. })));
    let good = serde_json::to_value(shard(1, 1, 1).summary).unwrap();
    let mut unknown = good.clone();
    unknown["per_clause"][0]["id"] = "exec.of_another_version".into();
    let mut impossible = good.clone();
    impossible["shard"]["index"] = 2.into();
    for bad in ["", "{}", "null", "[{}]", "\u{0}", &unknown.to_string(), &impossible.to_string()] {
        std::fs::write(&path, bad).unwrap();
        assert!(matches!(merge::read(&[path.clone()]), Err(MergeError::NoReport { .. })), "{bad}");
    }
    for fine in [good.to_string(), format!("[{good}, {good}]")] {
        std::fs::write(&path, &fine).unwrap();
        assert!(merge::read(&[path.clone()]).is_ok());
    }
}

/// A backend that cannot run here stands in every file, with the reason.
#[test]
fn a_backend_that_is_absent_is_shown_with_the_reason() {
    let target = KvmTarget::new();
    let Err(why) = target.fit() else { return };
    let plan = Plan::of(&target, &[]);
    let seeds = Seeds::one(0, SeedSource::Option);
    let summary = Session::new(Arc::new(target), plan, seeds).run(&mut |_| {});
    assert!(summary.per_clause.iter().all(|clause| clause.ignored.is_some()));
    let xml = junit::document(std::slice::from_ref(&summary)).unwrap();
    let document = Document::parse(&xml).unwrap();
    let skipped = document.descendants().find(|node| node.has_tag_name("skipped")).unwrap();
    assert!(skipped.attribute("message").unwrap().contains(why.lines().next().unwrap()));
}
