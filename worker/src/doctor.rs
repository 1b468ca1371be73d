//! `worker doctor`: what this machine offers, in lines for people.

use engine::backend::cpu::{Isa, Path};

use crate::device::{available_memory, cores_of_machine, processor_name};
use crate::memory::show;

/// What was found.
pub fn report() -> String {
    let best = Isa::detect().path();
    let usable = |path: &Path| {
        Path::ALL.iter().position(|p| p == path) >= Path::ALL.iter().position(|p| *p == best)
    };
    let paths: Vec<&str> = Path::ALL
        .iter()
        .filter(|path| usable(path))
        .map(|path| path.name())
        .collect();
    let memory = available_memory().map_or_else(|| "unknown".to_owned(), show);
    let nccl = match nccl_rs::Library::load() {
        Ok(library) => format!("{} ({})", library.version(), library.name()),
        Err(e) => e.to_string(),
    };
    [
        format!("processor          {}", processor_name()),
        format!("cores              {}", cores_of_machine()),
        format!(
            "instruction paths  {} (used: {})",
            paths.join(", "),
            best.name()
        ),
        format!("memory available   {memory}"),
        "cuda               not in this build".to_owned(),
        format!("nccl               {nccl}"),
    ]
    .join("\n")
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_report_names_the_path_in_use_and_what_is_missing() {
        let report = super::report();
        assert!(
            report.contains("portable (used: ") && report.contains("\ncuda "),
            "{report}"
        );
        assert_eq!(report.lines().count(), 6);
    }
}
