//! What machines tell of themselves, held to an order of states that a person can read.

use futures_util::{FutureExt, StreamExt};
use vm_trait::{EventStream, VmEvent, VmInstance, VmState};

/// Listens to one machine from the moment on at which there is a handle to it.
pub(crate) struct Ear {
    events: EventStream,
    /// Where the last change of state led that was heard of.
    last: Option<VmState>,
    /// Whether the agent is said to be lost.
    lost: bool,
}

impl Ear {
    pub(crate) fn new(vm: &dyn VmInstance) -> Self {
        Self { events: vm.events(), last: None, lost: false }
    }

    /// Takes what was told since it was last asked, once nothing is under way.
    ///
    /// # Errors
    /// What cannot be: a change that does not begin where the one before ended, one that no life has, an agent that
    /// comes back without having been lost, or a state that nobody was told of.
    pub(crate) fn listen(&mut self, now: &VmState) -> Result<(), String> {
        while let Some(Some(event)) = self.events.next().now_or_never() {
            match event {
                VmEvent::State { from, to } => self.change(&from, &to)?,
                VmEvent::AgentLost if self.lost => return Err("lost its agent twice".to_owned()),
                VmEvent::AgentLost => self.lost = true,
                VmEvent::AgentBack if !self.lost => {
                    return Err("has its agent back, which was not lost".to_owned());
                }
                VmEvent::AgentBack => self.lost = false,
                VmEvent::Missed(count) => return Err(format!("told of {count} events too many")),
                _ => {}
            }
        }
        match &self.last {
            Some(last) if last != now => Err(format!("is {now}, and last said {last}")),
            _ => Ok(()),
        }
    }

    fn change(&mut self, from: &VmState, to: &VmState) -> Result<(), String> {
        if let Some(last) = self.last.replace(to.clone())
            && last != *from
        {
            return Err(format!("went from {from} to {to}, but was {last}"));
        }
        if !may_follow(from, to) {
            return Err(format!("went from {from} to {to}"));
        }
        if !to.has_machine() {
            self.lost = false;
        }
        Ok(())
    }
}

/// Says which state may come after which.
fn may_follow(from: &VmState, to: &VmState) -> bool {
    use VmState as S;
    match from {
        S::Created => matches!(to, S::Starting),
        S::Starting => !matches!(to, S::Created | S::Starting),
        S::Running => matches!(to, S::Paused | S::Stopping | S::Stopped | S::Crashed(_)),
        S::Paused => matches!(to, S::Running | S::Stopping | S::Stopped | S::Crashed(_)),
        S::Stopping => matches!(to, S::Stopped | S::Crashed(_)),
        S::Stopped | S::Crashed(_) => matches!(to, S::Starting),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use VmState as S;
    use futures_util::stream;
    use vm_trait::CrashReason;

    fn heard(events: &[VmEvent], now: &VmState) -> Result<(), String> {
        let events = stream::iter(events.to_vec()).boxed();
        Ear { events, last: None, lost: false }.listen(now)
    }

    fn states(states: &[VmState]) -> Vec<VmEvent> {
        let changes = states.windows(2);
        changes.map(|two| VmEvent::State { from: two[0].clone(), to: two[1].clone() }).collect()
    }

    #[test]
    fn lives_are_told_in_order() {
        let crash = S::Crashed(CrashReason::VmmDied);
        let two = [S::Created, S::Starting, S::Running, S::Paused, crash, S::Starting, S::Stopped];
        assert_eq!(heard(&states(&two), &S::Stopped), Ok(()));
        assert_eq!(heard(&[], &S::Paused), Ok(()));
        let mut link = states(&two[..3]);
        link.extend([VmEvent::AgentLost, VmEvent::AgentBack, VmEvent::AgentLost]);
        link.extend(states(&[S::Running, S::Stopping, S::Stopped, S::Starting, S::Running]));
        link.push(VmEvent::AgentLost);
        assert_eq!(heard(&link, &S::Running), Ok(()));
    }

    #[test]
    fn what_cannot_be_is_noticed() {
        let gap = [states(&[S::Created, S::Starting]), states(&[S::Running, S::Paused])].concat();
        assert!(heard(&gap, &S::Paused).is_err());
        for wrong in [[S::Created, S::Running], [S::Stopped, S::Running], [S::Stopping, S::Running]]
        {
            assert!(heard(&states(&wrong), &S::Running).is_err(), "{wrong:?}");
        }
        assert!(heard(&states(&[S::Created, S::Starting]), &S::Running).is_err());
        assert!(heard(&[VmEvent::AgentBack], &S::Running).is_err());
        assert!(heard(&[VmEvent::AgentLost, VmEvent::AgentLost], &S::Running).is_err());
        assert!(heard(&[VmEvent::Missed(1)], &S::Running).is_err());
    }
}
