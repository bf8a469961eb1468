//! Comfort built from the trait alone.

use crate::{
    error::{GuestFileError, VmErrorKind, VmResult},
    exec::{ExecOutput, ExecRequest},
    file::{CreateDirOptions, RemoveOptions, WriteOptions},
    instance::{StopOptions, VmInstance},
};
use async_trait::async_trait;
use bytes::Bytes;

/// Short forms of what [`VmInstance`] offers; every machine has them.
///
/// ```
/// # use vm_sim::SimBackend;
/// # use vm_trait::*;
/// # #[tokio::main(flavor = "current_thread", start_paused = true)]
/// # async fn main() -> VmResult<()> {
/// # let backend = SimBackend::builder().seed(1).build().expect("inside a runtime");
/// # let vm = backend.create(VmConfig::default()).await?;
/// # vm.start().await?;
/// assert_eq!(vm.run("echo", ["hi"]).await?.stdout_text(), "hi\n");
/// assert_eq!(vm.sh("echo $((6 * 7))").await?.stdout_text(), "42\n");
/// vm.create_dir_all("/tmp/a/b").await?;
/// assert!(vm.exists("/tmp/a/b").await?);
/// # Ok(())
/// # }
/// ```
#[async_trait]
pub trait VmInstanceExt: VmInstance {
    /// Runs `program` with `args` and nothing else set.
    ///
    /// # Errors
    /// As [`VmInstance::exec`].
    async fn run<'a, I>(&self, program: &str, args: I) -> VmResult<ExecOutput>
    where
        I: IntoIterator<Item = &'a str> + Send,
        I::IntoIter: Send,
    {
        let request = ExecRequest::new(program).args(args);
        self.exec(request).await
    }

    /// Runs a script with the guest's `sh -c`.
    ///
    /// # Errors
    /// As [`VmInstance::exec`].
    async fn sh(&self, script: &str) -> VmResult<ExecOutput> {
        self.exec(ExecRequest::new("sh").args(["-c", script])).await
    }

    /// Says whether something stands at `path`.
    ///
    /// # Errors
    /// As [`VmInstance::stat`], except for what means that nothing is there.
    async fn exists(&self, path: &str) -> VmResult<bool> {
        match self.stat(path).await {
            Ok(_) => Ok(true),
            Err(error) => match error.kind() {
                VmErrorKind::GuestFile {
                    error: GuestFileError::NotFound | GuestFileError::NotADirectory,
                    ..
                } => Ok(false),
                _ => Err(error),
            },
        }
    }

    /// Reads a file as text, with damaged characters replaced.
    ///
    /// # Errors
    /// As [`VmInstance::read_file`].
    async fn read_to_string(&self, path: &str) -> VmResult<String> {
        let bytes = self.read_file(path).await?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Replaces a file with default options.
    ///
    /// # Errors
    /// As [`VmInstance::write_file`].
    async fn write(&self, path: &str, contents: impl Into<Bytes> + Send) -> VmResult<()> {
        let contents = contents.into();
        self.write_file(path, contents, WriteOptions::default()).await
    }

    /// Makes a directory and its missing parents.
    ///
    /// # Errors
    /// As [`VmInstance::create_dir`].
    async fn create_dir_all(&self, path: &str) -> VmResult<()> {
        let options = CreateDirOptions { recursive: true, ..CreateDirOptions::default() };
        self.create_dir(path, options).await
    }

    /// Removes a directory with all it holds, or a file.
    ///
    /// # Errors
    /// As [`VmInstance::remove`].
    async fn remove_all(&self, path: &str) -> VmResult<()> {
        self.remove(path, RemoveOptions { recursive: true }).await
    }

    /// Stops the machine and starts it again.
    ///
    /// # Errors
    /// As [`VmInstance::stop`] and [`VmInstance::start`].
    async fn restart(&self) -> VmResult<()> {
        self.stop(StopOptions::default()).await?;
        self.start().await
    }
}

impl<T: VmInstance + ?Sized> VmInstanceExt for T {}
