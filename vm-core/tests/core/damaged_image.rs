//! Memory that is found damaged while its machine already runs.

use crate::{
    frames::welcome,
    hostile_agent::on_paused_time,
    machine::{Act, Behaviour, Ill, Ports},
};
use bytes::Bytes;
use proptest::prelude::*;
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tempfile::TempDir;
use vm_core::{
    container::{Compatibility, ContainerWriter},
    host_fs::StdFs,
    machine::SectionSink,
};
use vm_guest_protocol::PROTOCOL_VERSION;
use vm_trait::{
    RestoreOptions, Snapshot, SnapshotId, SnapshotMetadata, VmBackend, VmConfig, VmErrorKind, VmId,
    VmState,
};

/// How much memory the snapshot holds: more than is read in one go.
const LENGTH: usize = 3 << 20;

/// Says what a snapshot of a machine of this configuration holds.
pub(crate) fn metadata(config: &VmConfig) -> SnapshotMetadata {
    SnapshotMetadata {
        id: SnapshotId(1),
        vm: VmId(2),
        backend: "ill".to_owned(),
        taken_at: Duration::ZERO,
        arch: "none".to_owned(),
        vcpus: config.vcpus,
        memory: config.memory,
        label: None,
        base: None,
    }
}

/// Writes a snapshot that machines of [`Ill`] load without looking at it, and gives it with the place of its image.
async fn snapshot(path: PathBuf) -> (Snapshot, u64) {
    let mut config = VmConfig::default();
    config.timeouts.capture = Duration::from_secs(20);
    let metadata = metadata(&config);
    let compatibility = Compatibility {
        backend: metadata.backend.clone(),
        arch: metadata.arch.clone(),
        vcpus: config.vcpus,
        memory: config.memory,
        agent_protocol: PROTOCOL_VERSION,
    };
    let mut writer = ContainerWriter::create(Arc::new(StdFs), &path, 1).await.unwrap();
    writer.begin_image("memory", 1 << 30).await.unwrap();
    writer.write_at(1 << 20, Bytes::from(vec![7; LENGTH])).await.unwrap();
    writer.finish(metadata.clone(), config, compatibility, None).await.unwrap();
    let at = fs::read(&path).unwrap().windows(64).position(|bytes| bytes == [7; 64]).unwrap();
    (Snapshot::new(path, metadata), at as u64)
}

fn damage(path: &Path, at: u64) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[8], at).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn nobody_gets_a_machine_with_damaged_memory(
        at in 0..LENGTH as u64, fate in 0..4_u8, resume in any::<bool>(), in_place in any::<bool>(),
    ) {
        on_paused_time(async {
            let dir = TempDir::new().unwrap();
            let (snapshot, start) = snapshot(dir.path().join("snapshot")).await;
            // What a guest does that runs on damaged memory: anything.
            let script = match fate {
                0 => vec![Act::Frame(0, welcome(false))],
                1 => vec![Act::HangUp],
                2 => vec![Act::Bytes(b"nonsense".to_vec()), Act::HangUp],
                _ => vec![Act::Wait(Duration::from_secs(3600))],
            };
            let behaviour = Behaviour { scripts: vec![script], ports: Ports::Silent, mute: false };
            let ill = Ill::new(behaviour);
            let backend = ill.backend();
            let mut options = RestoreOptions::paused();
            options.resume = resume;
            if fate == 0 || !resume {
                let whole = backend.restore(&snapshot, options).await.expect("a restore");
                let wanted = if resume { VmState::Running } else { VmState::Paused };
                assert_eq!(whole.state(), wanted);
            }
            damage(&snapshot.path, start + at);
            let refused = if in_place {
                let vm = backend.create(VmConfig::default()).await.expect("create");
                let refused = vm.restore(&snapshot, options).await;
                assert!(vm.state().is_ended(), "{}", vm.state());
                refused
            } else {
                backend.restore(&snapshot, options).await.map(drop)
            };
            let error = refused.expect_err("a restore from damaged memory");
            assert!(matches!(error.kind(), VmErrorKind::SnapshotCorrupt { .. }), "{error}");
            if resume {
                assert!(ill.resumes.load(Ordering::Relaxed) > 0, "the guest did not run meanwhile");
            }
        });
    }
}
