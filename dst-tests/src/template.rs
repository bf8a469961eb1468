//! Machines forked from one that was booted before, because booting a real one takes seconds.

use std::{fmt, sync::Arc};
use tokio::sync::Mutex;
use vm_trait::{ForkOptions, VmBackend, VmConfig, VmInstance, VmResult, VmState};

/// A machine of default configuration that stands still, and of which others are forked. Clones share it.
#[derive(Clone)]
pub struct Template {
    backend: Arc<dyn VmBackend>,
    source: Arc<Mutex<Option<Arc<dyn VmInstance>>>>,
    note: Arc<Note>,
}

/// Where running machines of default configuration come from.
#[derive(Clone, Debug)]
pub enum MachineSource {
    /// Each is booted.
    Boot(Arc<dyn VmBackend>),
    /// Each is forked.
    Fork(Template),
}

/// Takes note of a machine that was forked.
pub type Note = dyn Fn(&Arc<dyn VmInstance>) + Send + Sync;

impl Template {
    /// Makes a template of a backend that can [`Fork`](vm_trait::Capability::Fork). It is booted with the first use.
    #[must_use]
    pub fn new(backend: Arc<dyn VmBackend>) -> Self {
        Self { backend, source: Arc::default(), note: Arc::new(|_| ()) }
    }

    /// Gives the same template, each of whose machines `note` is told.
    #[must_use]
    pub fn noting(&self, note: Arc<Note>) -> Self {
        Self { note, ..self.clone() }
    }

    /// Gives a running machine of its own that was forked. When the future is dropped, nothing is left of it.
    ///
    /// # Errors
    /// The backend's.
    pub async fn running(&self) -> VmResult<Arc<dyn VmInstance>> {
        let source = self.source().await?;
        let child = match source.fork(ForkOptions::new(1)).await?.pop() {
            Some(child) => child?,
            // A backend that breaks its promise: the clause then has a machine that was booted.
            None => boot(&*self.backend).await?,
        };
        (self.note)(&child);
        if child.state() == VmState::Paused {
            child.resume().await?;
        }
        Ok(child)
    }

    /// Ends the template; the next use boots another.
    pub async fn close(&self) {
        drop(self.source.lock().await.take());
    }

    async fn source(&self) -> VmResult<Arc<dyn VmInstance>> {
        let mut source = self.source.lock().await;
        if let Some(vm) = source.as_ref().filter(|vm| vm.state() == VmState::Paused) {
            return Ok(vm.clone());
        }
        let vm = boot(&*self.backend).await?;
        vm.pause().await?;
        *source = Some(vm.clone());
        Ok(vm)
    }
}

impl MachineSource {
    /// Gives a running machine that nobody else has.
    ///
    /// # Errors
    /// The backend's.
    pub async fn running(&self) -> VmResult<Arc<dyn VmInstance>> {
        match self {
            Self::Boot(backend) => boot(&**backend).await,
            Self::Fork(template) => template.running().await,
        }
    }
}

async fn boot(backend: &dyn VmBackend) -> VmResult<Arc<dyn VmInstance>> {
    let vm = backend.create(VmConfig::default()).await?;
    vm.start().await?;
    Ok(vm)
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Template").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_sim::SimBackend;
    use vm_trait::{VmInstanceExt, WriteOptions};

    #[tokio::test(start_paused = true)]
    async fn each_is_a_machine_of_its_own() {
        let backend = SimBackend::builder().seed(7).build().unwrap();
        let template = Template::new(Arc::new(backend.clone()));
        let (one, other) = (template.running().await.unwrap(), template.running().await.unwrap());
        assert_eq!(one.state(), VmState::Running);
        one.write_file("/tmp/mine", "x".into(), WriteOptions::default()).await.unwrap();
        assert!(!other.exists("/tmp/mine").await.unwrap());
        other.kill().await.unwrap();
        one.sh("true").await.unwrap();
        drop((one, other));
        template.close().await;
        tokio::time::sleep(std::time::Duration::from_secs(60)).await;
        assert!(backend.ledger().leftovers().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_template_that_died_is_booted_anew() {
        let backend = SimBackend::builder().seed(7).build().unwrap();
        let template = Template::new(Arc::new(backend));
        template.source().await.unwrap().kill().await.unwrap();
        template.running().await.unwrap().sh("true").await.unwrap();
    }
}
