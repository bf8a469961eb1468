//! Linearizability: whether calls that overlapped went as they would have one after the other.
//!
//! The search is that of Wing and Gong, with the states already met left out as Lowe proposed. Unlike a checker that
//! answers yes or no, it gives every state that may stand at the end, and a call may lead to several states or to none,
//! so that the calls of the next step can be checked from there on.

use std::collections::BTreeSet;

/// When something began and ended, by any clock that orders both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// When it began.
    pub began: u32,
    /// When it ended.
    pub ended: u32,
}

/// Gives all states that the calls may have led to from any of `states`, each having taken effect at one instant between
/// its beginning and its end.
///
/// `next` gives the states that call number `index` leads to, as it went, from one state, and none where it cannot have
/// gone like that there; it is told which calls have not yet taken effect. No state at the end means that the calls
/// are not linearizable.
///
/// # Panics
/// When there are more than 32 calls.
pub fn outcomes<S: Ord + Clone>(
    states: BTreeSet<S>,
    spans: &[Span],
    mut next: impl FnMut(&S, usize, &[usize]) -> Vec<S>,
) -> BTreeSet<S> {
    assert!(spans.len() <= 32, "{} calls at the same time", spans.len());
    let mut front: BTreeSet<(u32, S)> = states.into_iter().map(|state| (0, state)).collect();
    for _ in 0..spans.len() {
        let mut further = BTreeSet::new();
        for (done, state) in front {
            let left: Vec<_> = (0..spans.len()).filter(|index| done & (1 << index) == 0).collect();
            for &index in &left {
                // Whatever ended before this one began must have had its effect.
                let begun = spans[index].began;
                if left.iter().any(|&other| other != index && spans[other].ended < begun) {
                    continue;
                }
                let beside: Vec<_> = left.iter().copied().filter(|&other| other != index).collect();
                let after = next(&state, index, &beside);
                further.extend(after.into_iter().map(|after| (done | 1 << index, after)));
            }
        }
        front = further;
    }
    front.into_iter().map(|(_, state)| state).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Calls on a number.
    #[derive(Clone, Copy, Debug)]
    enum Call {
        Write(u8),
        Read(u8),
        /// It may have been done or not.
        Lost(u8),
    }

    fn step(state: u8, call: Call) -> Vec<u8> {
        match call {
            Call::Write(value) => vec![value],
            Call::Read(value) if value == state => vec![state],
            Call::Read(_) => vec![],
            Call::Lost(value) => vec![state, value],
        }
    }

    fn run(calls: &[(Call, u32, u32)]) -> Vec<u8> {
        let spans: Vec<_> = calls.iter().map(|&(_, began, ended)| Span { began, ended }).collect();
        let ends =
            outcomes(BTreeSet::from([0]), &spans, |state, index, _| step(*state, calls[index].0));
        ends.into_iter().collect()
    }

    #[test]
    fn overlapping_calls_may_take_effect_in_either_order() {
        assert_eq!(run(&[(Call::Write(1), 0, 2), (Call::Read(0), 1, 3)]), [1]);
        assert_eq!(run(&[(Call::Write(1), 0, 2), (Call::Read(1), 1, 3)]), [1]);
        assert_eq!(run(&[(Call::Write(1), 0, 2), (Call::Write(2), 1, 3)]), [1, 2]);
        assert_eq!(run(&[(Call::Lost(1), 0, 1), (Call::Lost(2), 2, 3)]), [0, 1, 2]);
    }

    #[test]
    fn calls_that_do_not_overlap_take_effect_in_their_order() {
        assert!(run(&[(Call::Write(1), 0, 1), (Call::Read(0), 2, 3)]).is_empty());
        // The second read is after the first, and cannot be from before it.
        let stale = [(Call::Write(1), 0, 5), (Call::Read(1), 1, 2), (Call::Read(0), 3, 4)];
        assert!(run(&stale).is_empty());
        let fresh = [(Call::Write(1), 0, 5), (Call::Read(0), 1, 2), (Call::Read(1), 3, 4)];
        assert_eq!(run(&fresh), [1]);
    }

    /// Tries every order of the calls.
    fn by_brute_force(calls: &[(Call, u32, u32)]) -> BTreeSet<u8> {
        fn extend(left: &[(Call, u32, u32)], state: u8, ends: &mut BTreeSet<u8>) {
            if left.is_empty() {
                ends.insert(state);
            }
            for (index, &(call, began, _)) in left.iter().enumerate() {
                let mut rest = left.to_vec();
                rest.remove(index);
                if rest.iter().all(|&(_, _, ended)| ended >= began) {
                    step(state, call).into_iter().for_each(|state| extend(&rest, state, ends));
                }
            }
        }
        let mut ends = BTreeSet::new();
        extend(calls, 0, &mut ends);
        ends
    }

    fn call() -> impl Strategy<Value = (Call, u32, u32)> {
        let kind = prop_oneof![
            (0_u8..3).prop_map(Call::Write),
            (0_u8..3).prop_map(Call::Read),
            (0_u8..3).prop_map(Call::Lost),
        ];
        (kind, 0_u32..10, 0_u32..6).prop_map(|(call, began, length)| (call, began, began + length))
    }

    proptest! {
        #[test]
        fn it_agrees_with_trying_every_order(calls in prop::collection::vec(call(), 0..6)) {
            let found: BTreeSet<_> = run(&calls).into_iter().collect();
            prop_assert_eq!(found, by_brute_force(&calls));
        }
    }
}
