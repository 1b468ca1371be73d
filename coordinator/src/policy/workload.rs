//! Workload types and sizes: from the name in a request to devices, and how many requests run at a time.
//!
//! Which types exist is configuration; this file only looks up and words the refusal.

use common::config::WorkloadType;

use crate::api::{ApiError, EntitySpec, ErrorKind, WorkloadSize};

impl WorkloadSize {
    /// Requests admitted at a time per served entity.
    pub fn concurrency(self) -> u32 {
        match self {
            WorkloadSize::Small => 4,
            WorkloadSize::Medium => 16,
            WorkloadSize::Large => 64,
        }
    }

    /// As clients write it.
    pub fn name(self) -> &'static str {
        match self {
            WorkloadSize::Small => "Small",
            WorkloadSize::Medium => "Medium",
            WorkloadSize::Large => "Large",
        }
    }

    /// From a client's word; `None` for any other.
    pub fn parse(text: &str) -> Option<Self> {
        [
            WorkloadSize::Small,
            WorkloadSize::Medium,
            WorkloadSize::Large,
        ]
        .into_iter()
        .find(|size| size.name() == text)
    }
}

impl EntitySpec {
    /// Requests admitted at a time.
    pub fn admitted(&self) -> u32 {
        self.concurrency
            .map_or(self.workload_size.concurrency(), |range| range.max)
    }
}

/// The mapped type of this name.
///
/// # Errors
/// An unmapped type is refused in the words clients know, with the list of those that are mapped.
pub fn resolve<'a>(
    types: &'a [WorkloadType],
    name: &str,
    size: WorkloadSize,
) -> Result<&'a WorkloadType, ApiError> {
    types.iter().find(|entry| entry.name == name).ok_or_else(|| {
        let names: Vec<&str> = types.iter().map(|entry| entry.name.as_str()).collect();
        let message = format!(
            "Workload type '{name}' with size '{}' is not supported. Please choose a node type from [{}]",
            size.name(),
            names.join(", ")
        );
        ApiError::new(ErrorKind::InvalidParameter, message)
    })
}

/// What stands in for what, for the state message; `None` for the real thing.
pub fn stand_in(workload: &WorkloadType) -> Option<String> {
    let real = workload.stands_in_for.as_deref()?;
    let device = match (workload.device, workload.shards) {
        (common::wire::message::DeviceKind::Cpu, 1) => "a CPU stands".to_owned(),
        (common::wire::message::DeviceKind::Cpu, n) => format!("{n} CPU shards stand"),
        (common::wire::message::DeviceKind::Cuda, 1) => "another GPU stands".to_owned(),
        (common::wire::message::DeviceKind::Cuda, n) => format!("{n} other GPUs stand"),
    };
    Some(format!("{device} in for {real}"))
}

#[cfg(test)]
mod tests {
    use common::wire::message::DeviceKind;

    use super::*;

    fn mapped(name: &str, shards: u32, stands_in_for: Option<&str>) -> WorkloadType {
        WorkloadType {
            name: name.into(),
            device: DeviceKind::Cpu,
            shards,
            memory_bytes: None,
            stands_in_for: stands_in_for.map(str::to_owned),
        }
    }

    #[test]
    fn an_unmapped_type_is_refused_with_the_mapped_ones() {
        let types = [
            mapped("CPU", 1, None),
            mapped("GPU_LARGE", 1, Some("1 x A100 80 GB")),
        ];
        assert_eq!(
            resolve(&types, "GPU_LARGE", WorkloadSize::Small)
                .unwrap()
                .name,
            "GPU_LARGE"
        );
        let refused = resolve(&types, "GPU_MEDIUM", WorkloadSize::Small).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::InvalidParameter);
        assert_eq!(
            refused.message,
            "Workload type 'GPU_MEDIUM' with size 'Small' is not supported. Please choose a node type from [CPU, GPU_LARGE]"
        );
    }

    #[test]
    fn a_stand_in_says_what_it_stands_for() {
        assert_eq!(stand_in(&mapped("CPU", 1, None)), None);
        let one = mapped("GPU_LARGE", 1, Some("1 x A100 80 GB"));
        assert_eq!(
            stand_in(&one).unwrap(),
            "a CPU stands in for 1 x A100 80 GB"
        );
        let two = mapped("GPU_LARGE_2", 2, Some("2 x A100 80 GB"));
        assert_eq!(
            stand_in(&two).unwrap(),
            "2 CPU shards stand in for 2 x A100 80 GB"
        );
    }

    #[test]
    fn sizes_are_read_back_from_their_names() {
        for (size, concurrency) in [
            (WorkloadSize::Small, 4),
            (WorkloadSize::Medium, 16),
            (WorkloadSize::Large, 64),
        ] {
            assert_eq!(WorkloadSize::parse(size.name()), Some(size));
            assert_eq!(size.concurrency(), concurrency);
        }
        assert_eq!(WorkloadSize::parse("small"), None);
    }
}
