//! [`CountedFaults`]: counts the faults that a check orders.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};
use vm_core::fault::{FaultControl, FaultKind, FaultOrder, FaultRefused};
use vm_trait::VmInstance;

/// Passes everything on, and counts what was ordered.
#[derive(Debug)]
pub(crate) struct CountedFaults {
    inner: Arc<dyn FaultControl>,
    ordered: Mutex<BTreeMap<FaultKind, u64>>,
}

impl CountedFaults {
    pub(crate) fn new(inner: Arc<dyn FaultControl>) -> Arc<Self> {
        Arc::new(Self { inner, ordered: Mutex::default() })
    }

    /// Gives how often each kind was ordered. An order that was refused is none.
    pub(crate) fn ordered(&self) -> BTreeMap<FaultKind, u64> {
        self.ordered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl FaultControl for CountedFaults {
    fn can(&self, kind: FaultKind) -> bool {
        self.inner.can(kind)
    }

    fn order(&self, order: FaultOrder) -> Result<(), FaultRefused> {
        let kind = order.kind;
        self.inner.order(order)?;
        *self.ordered.lock().unwrap_or_else(PoisonError::into_inner).entry(kind).or_default() += 1;
        Ok(())
    }

    fn meet(&self, vm: &Arc<dyn VmInstance>) {
        self.inner.meet(vm);
    }

    fn fired(&self) -> BTreeMap<FaultKind, u64> {
        self.inner.fired()
    }

    fn pending(&self) -> Vec<FaultOrder> {
        self.inner.pending()
    }
}
