//! What writing and verifying a snapshot costs, without the disk.

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use futures_util::FutureExt;
use std::{
    hint::black_box,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};
use vm_core::{
    container::{Compatibility, ContainerWriter, verify_bytes},
    host_fs::{HostFile, HostFileReader, HostFs},
    machine::SectionSink,
};
use vm_trait::{Mib, SnapshotId, SnapshotMetadata, VmConfig, VmId};

/// Keeps the one file that is written.
#[derive(Clone, Debug, Default)]
struct OneFile(Arc<Mutex<BytesMut>>);

#[async_trait]
impl HostFs for OneFile {
    async fn create_dir_all(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn create_new(&self, _path: &Path) -> io::Result<Box<dyn HostFile>> {
        Ok(Box::new(self.clone()))
    }

    async fn open(&self, _path: &Path) -> io::Result<Box<dyn HostFileReader>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    async fn rename(&self, _from: &Path, _to: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn remove(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_now(&self, _path: &Path) {}

    async fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    async fn list(&self, _path: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl HostFile for OneFile {
    async fn write_all(&mut self, bytes: Bytes) -> io::Result<()> {
        self.0.lock().map_err(|_| io::ErrorKind::Other)?.extend_from_slice(&bytes);
        Ok(())
    }

    async fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes a container of so many sections of equal length.
fn write(sections: usize, content: &Bytes) -> Bytes {
    let fs = OneFile::default();
    let shared: Arc<dyn HostFs> = Arc::new(fs.clone());
    let (backend, arch, memory) = ("sim".to_owned(), "x86_64".to_owned(), Mib(128));
    let metadata = SnapshotMetadata {
        id: SnapshotId(1),
        vm: VmId(2),
        backend: backend.clone(),
        taken_at: Duration::from_secs(1_700_000_000),
        arch: arch.clone(),
        vcpus: 1,
        memory,
        label: None,
        base: None,
    };
    let compatibility = Compatibility { backend, arch, vcpus: 1, memory, agent_protocol: 1 };
    let writing = async {
        let mut writer = ContainerWriter::create(shared, Path::new("/snapshot"), 1).await?;
        for section in 0..sections {
            writer.begin(&format!("section{section}")).await.expect("names differ");
            writer.write(content.clone()).await.expect("nothing fails");
        }
        writer.finish(metadata, VmConfig::default(), compatibility, None).await
    };
    // Nothing waits but hashing, which lets others run.
    let mut writing = Box::pin(writing);
    while (&mut writing).now_or_never().is_none() {}
    let bytes = fs.0.lock().expect("nothing panics").split();
    bytes.freeze()
}

fn benches(criterion: &mut Criterion) {
    let sizes = [("1 x 4 KiB", 1, 4 << 10), ("4 x 1 KiB", 4, 1 << 10), ("1 x 64 MiB", 1, 64 << 20)];
    for (name, sections, length) in sizes {
        let content = Bytes::from(vec![0x5a; length]);
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Bytes((sections * length) as u64));
        group.bench_function("write", |bencher| {
            bencher.iter(|| write(sections, black_box(&content)));
        });
        let bytes = write(sections, &content);
        group.bench_function("verify", |bencher| {
            bencher.iter_batched(
                || bytes.clone(),
                |bytes| verify_bytes(black_box(&bytes)),
                BatchSize::SmallInput,
            );
        });
        group.finish();
    }
}

criterion_group!(container, benches);
criterion_main!(container);
