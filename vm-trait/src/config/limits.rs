//! What each program in the guest may use.

use crate::error::VmErrorKind;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt};

/// Something that a program may use only so much of, named as in setrlimit(2), where each is described.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Resource {
    Cpu,
    Fsize,
    Data,
    Stack,
    Core,
    Rss,
    Nproc,
    Nofile,
    Memlock,
    As,
    Locks,
    Sigpending,
    Msgqueue,
    Nice,
    Rtprio,
    Rttime,
}

impl Resource {
    /// Lists every resource in the order of the numbers that Linux has for them, from 0.
    pub const ALL: &'static [Self] = &[
        Self::Cpu,
        Self::Fsize,
        Self::Data,
        Self::Stack,
        Self::Core,
        Self::Rss,
        Self::Nproc,
        Self::Nofile,
        Self::Memlock,
        Self::As,
        Self::Locks,
        Self::Sigpending,
        Self::Msgqueue,
        Self::Nice,
        Self::Rtprio,
        Self::Rttime,
    ];

    /// Gives the name without `RLIMIT_`, in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Fsize => "fsize",
            Self::Data => "data",
            Self::Stack => "stack",
            Self::Core => "core",
            Self::Rss => "rss",
            Self::Nproc => "nproc",
            Self::Nofile => "nofile",
            Self::Memlock => "memlock",
            Self::As => "as",
            Self::Locks => "locks",
            Self::Sigpending => "sigpending",
            Self::Msgqueue => "msgqueue",
            Self::Nice => "nice",
            Self::Rtprio => "rtprio",
            Self::Rttime => "rttime",
        }
    }

    /// Gives the number that Linux has for it.
    #[must_use]
    pub fn number(self) -> u8 {
        self as u8
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How much of a resource a program may use, in the unit of setrlimit(2). `None` is no limit.
///
/// ```
/// use vm_trait::{Limit, Resource, VmConfig};
/// let config = VmConfig::builder()
///     .with_limit(Resource::Nofile, Limit::of(256))
///     .with_limit(Resource::Fsize, Limit { soft: Some(1 << 20), hard: None })
///     .build()?;
/// assert_eq!(config.limits[&Resource::Nofile].hard, Some(256));
/// # Ok::<(), vm_trait::VmError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limit {
    /// What is enforced, and what a program may change up to `hard`. Default none.
    pub soft: Option<u64>,
    /// What `soft` may be raised to, and what an unprivileged program cannot raise. Default none.
    pub hard: Option<u64>,
}

impl Limit {
    /// Sets both to one value.
    #[must_use]
    pub fn of(value: u64) -> Self {
        Self { soft: Some(value), hard: Some(value) }
    }
}

/// The most open files that Linux lets a limit allow (`fs.nr_open`).
const MAX_OPEN_FILES: u64 = 1 << 20;

/// Checks all limits.
pub(super) fn validate(limits: &BTreeMap<Resource, Limit>) -> Result<(), VmErrorKind> {
    for (resource, Limit { soft, hard }) in limits {
        let invalid =
            |reason: String| Err(VmErrorKind::invalid(format!("limits.{resource}"), reason));
        if [*soft, *hard].contains(&Some(u64::MAX)) {
            return invalid(format!("{} is no amount; leave it out for no limit", u64::MAX));
        }
        let (low, high) = (soft.unwrap_or(u64::MAX), hard.unwrap_or(u64::MAX));
        if low > high {
            let shown =
                soft.map_or_else(|| "no soft limit".to_owned(), |soft| format!("soft {soft}"));
            return invalid(format!("{shown} is above hard {high}"));
        }
        if *resource == Resource::Nofile && high > MAX_OPEN_FILES {
            return invalid(format!(
                "Linux allows at most {MAX_OPEN_FILES} open files, and no absence of a limit"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn amount() -> impl Strategy<Value = Option<u64>> {
        prop_oneof![
            Just(None),
            Just(Some(u64::MAX)),
            (0..4_u64).prop_map(Some),
            any::<u64>().prop_map(Some)
        ]
    }

    #[test]
    fn numbers_are_those_of_linux() {
        for (number, resource) in Resource::ALL.iter().enumerate() {
            assert_eq!(usize::from(resource.number()), number);
            assert_eq!(serde_json::to_value(resource).unwrap(), resource.name());
        }
        assert_eq!((Resource::Nofile.number(), Resource::Rttime.number()), (7, 15));
    }

    proptest! {
        #[test]
        fn only_limits_that_linux_would_take_are_taken(
            resource in prop::sample::select(Resource::ALL),
            soft in amount(),
            hard in amount(),
        ) {
            let limits = BTreeMap::from([(resource, Limit { soft, hard })]);
            let named = soft != Some(u64::MAX) && hard != Some(u64::MAX);
            let ordered = hard.is_none_or(|hard| soft.is_some_and(|soft| soft <= hard));
            let counted = resource != Resource::Nofile || hard.is_some_and(|hard| hard <= 1 << 20);
            let outcome = validate(&limits);
            prop_assert_eq!(outcome.is_ok(), named && ordered && counted);
            if let Err(VmErrorKind::InvalidConfig { field, .. }) = outcome {
                prop_assert_eq!(field, format!("limits.{resource}"));
            }
            let text = serde_json::to_string(&limits).unwrap();
            prop_assert_eq!(serde_json::from_str::<BTreeMap<Resource, Limit>>(&text).unwrap(), limits);
        }
    }

    #[test]
    fn a_resource_is_shown_by_its_name() {
        assert_eq!(Resource::Nofile.to_string(), "nofile");
        for resource in Resource::ALL {
            assert_eq!(resource.to_string(), resource.name());
        }
    }

    #[test]
    fn open_files_are_limited_up_to_what_linux_allows() {
        let limited = |most| validate(&BTreeMap::from([(Resource::Nofile, Limit::of(most))]));
        assert_eq!(limited(MAX_OPEN_FILES), Ok(()));
        assert!(limited(MAX_OPEN_FILES + 1).is_err());
    }
}
