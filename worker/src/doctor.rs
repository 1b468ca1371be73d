//! `worker doctor`: what this machine offers, in lines for people. What is missing says how to get it.

use engine::backend::cpu::{Isa, Path};

use crate::device::cores::{Allowed, Wish, split};
use crate::device::cpu::{available_memory, processor_name};
use crate::memory::show;

/// A name and what there is to say of it.
type Line = (String, String);

/// What was found.
pub fn report() -> String {
    let mut lines = host();
    lines.extend(gpus());
    lines.push(line("nccl", nccl()));
    table(&lines)
}

fn line(name: &str, text: impl Into<String>) -> Line {
    (name.to_owned(), text.into())
}

/// Names to the left, texts to the right.
fn table(lines: &[Line]) -> String {
    let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let rows = lines
        .iter()
        .map(|(name, text)| format!("{name:width$}  {text}"));
    rows.collect::<Vec<_>>().join("\n")
}

fn host() -> Vec<Line> {
    let best = Isa::detect().path();
    let usable = |path: &Path| {
        Path::ALL.iter().position(|p| p == path) >= Path::ALL.iter().position(|p| *p == best)
    };
    let paths: Vec<&str> = Path::ALL
        .iter()
        .filter(|path| usable(path))
        .map(|path| path.name())
        .collect();
    let allowed = Allowed::read();
    let memory = available_memory().map_or_else(|| "unknown".to_owned(), show);
    vec![
        line("processor", processor_name()),
        line("cores", allowed.to_string()),
        line(
            "one worker's part",
            split(&allowed, &[Wish::default()], 0).to_string(),
        ),
        line(
            "instruction paths",
            format!("{} (used: {})", paths.join(", "), best.name()),
        ),
        line("memory available", memory),
    ]
}

fn nccl() -> String {
    match nccl_rs::Library::load() {
        Ok(library) => format!("{} ({})", library.version(), library.name()),
        Err(error) => format!("{error}; only groups of several GPUs need it"),
    }
}

#[cfg(not(feature = "cuda"))]
fn gpus() -> Vec<Line> {
    vec![line(
        "cuda",
        "not in this build: build the worker with the feature \"cuda\" (on by default)",
    )]
}

#[cfg(feature = "cuda")]
fn gpus() -> Vec<Line> {
    use engine::backend::cuda::survey;
    gpu_lines(&survey())
}

#[cfg(feature = "cuda")]
fn gpu_lines(survey: &engine::backend::cuda::Survey) -> Vec<Line> {
    let mut lines = Vec::new();
    match &survey.driver {
        Ok((major, minor)) => lines.push(line("cuda driver", format!("CUDA {major}.{minor}"))),
        Err(error) => lines.push(line("cuda driver", error.to_string())),
    }
    match &survey.devices {
        Ok(devices) => {
            for device in devices {
                let (major, minor) = device.compute_capability;
                let text = format!(
                    "{}, {}, compute capability {major}.{minor}, PCI {}",
                    device.name,
                    show(device.memory_bytes),
                    device.pci
                );
                lines.push(line(&format!("cuda:{}", device.ordinal), text));
            }
            if devices.len() > 1 {
                lines.push(line("peer access", peers(&survey.peers)));
            }
        }
        // Without a driver there are none, and that is said.
        Err(_) if survey.driver.is_err() => {}
        Err(error) => lines.push(line("cuda devices", error.to_string())),
    }
    lines.push(line(
        "cublas",
        match &survey.cublas {
            Ok([major, minor, patch]) => format!("{major}.{minor}.{patch}"),
            Err(error) => error.to_string(),
        },
    ));
    lines.push(line(
        "nvrtc",
        match survey.nvrtc {
            Some((major, minor)) => format!("{major}.{minor}"),
            None => "not there; only GPUs without kernels in this program need it (those of compute capability 8.0 and 9.0 \
                     are in it). It comes with the CUDA toolkit, or with pip's nvidia-cuda-nvrtc-cu12"
                .to_owned(),
        },
    ));
    lines
}

/// Which pairs of devices read each other's memory directly.
#[cfg(feature = "cuda")]
fn peers(peers: &[Vec<bool>]) -> String {
    let mut pairs = Vec::new();
    for (a, row) in peers.iter().enumerate() {
        for b in a + 1..row.len() {
            let both = row[b] && peers[b][a];
            pairs.push(format!("{a}-{b} {}", if both { "yes" } else { "no" }));
        }
    }
    pairs.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_names_the_path_in_use_and_what_is_missing() {
        let report = report();
        assert!(
            report.contains("portable (used: ") && report.contains("\ncuda"),
            "{report}"
        );
        assert!(
            report.lines().last().unwrap().starts_with("nccl"),
            "{report}"
        );
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn devices_are_told_one_by_one_and_missing_libraries_once() {
        use engine::backend::cuda::{CudaError, DeviceFacts, Survey};

        let device = |ordinal| DeviceFacts {
            ordinal,
            name: "NVIDIA A100 80GB".into(),
            memory_bytes: 79 << 30,
            compute_capability: (8, 0),
            pci: format!("0000:3{ordinal}:00.0"),
        };
        let whole = Survey {
            driver: Ok((12, 8)),
            devices: Ok(vec![device(0), device(1)]),
            peers: vec![vec![false, true], vec![true, false]],
            cublas: Ok([12, 8, 4]),
            nvrtc: Some((12, 9)),
        };
        assert_eq!(
            table(&gpu_lines(&whole)),
            "cuda driver  CUDA 12.8\n\
             cuda:0       NVIDIA A100 80GB, 79.00 GiB, compute capability 8.0, PCI 0000:30:00.0\n\
             cuda:1       NVIDIA A100 80GB, 79.00 GiB, compute capability 8.0, PCI 0000:31:00.0\n\
             peer access  0-1 yes\n\
             cublas       12.8.4\n\
             nvrtc        12.9"
        );
        let bare = Survey {
            driver: Err(CudaError::NoDriver),
            devices: Err(CudaError::NoDriver),
            peers: Vec::new(),
            cublas: Err(CudaError::NoDriver),
            nvrtc: None,
        };
        let names: Vec<String> = gpu_lines(&bare).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["cuda driver", "cublas", "nvrtc"]);
    }
}
