//! The cluster.toml of a test: written whole, so that a test says only what matters to it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use crate::golden;

/// What a test's cluster is made of.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Devices `local/cpu0`, `local/cpu1`, ...: one worker each.
    pub workers: usize,
    /// Devices `local/gpu0`, `local/gpu1`, ... after them; with any there are the workload types `GPU` and `GPU_2`.
    pub gpus: usize,
    /// More lines of each GPU, such as `graphs = false`; no more where there are none.
    pub gpu_lines: Vec<&'static str>,
    /// Environment of the workers, beside the test's own.
    pub worker_env: Vec<(String, String)>,
    /// Memory of each CPU, as cluster.toml writes it. That of GPUs is what their driver says.
    pub memory: String,
    /// Registered models.
    pub models: Vec<Model>,
    /// Keys of `[limits]`.
    pub limits: Vec<(&'static str, u64)>,
    /// More lines at the end of the file.
    pub extra: String,
}

/// A registered model.
#[derive(Debug, Clone)]
pub struct Model {
    /// `ml.demo.tiny-llama` for example.
    pub name: String,
    /// Its version.
    pub version: u32,
    /// Its folder.
    pub path: PathBuf,
    /// `f32`, or the default (bf16).
    pub kv_dtype: Option<&'static str>,
    /// `int8` or `int4`, or the default (none).
    pub quantization: Option<&'static str>,
    /// Longest sequence, when less than the model's.
    pub context_max: Option<u32>,
}

impl Model {
    /// One of the repository's tiny models as `ml.demo.NAME` version 1.
    pub fn tiny(name: &str) -> Model {
        Model::at(&format!("ml.demo.{name}"), &golden::model_folder(name))
    }

    /// A model folder under a name, version 1.
    pub fn at(name: &str, path: &Path) -> Model {
        Model {
            name: name.to_owned(),
            version: 1,
            path: path.to_owned(),
            kv_dtype: None,
            quantization: None,
            context_max: None,
        }
    }
}

impl Settings {
    /// One worker and the three tiny models.
    pub fn new() -> Settings {
        Settings::with_workers(1)
    }

    /// `workers` workers and the three tiny models.
    pub fn with_workers(workers: usize) -> Settings {
        Settings {
            workers,
            gpus: 0,
            gpu_lines: Vec::new(),
            worker_env: Vec::new(),
            memory: "512MiB".into(),
            models: golden::FAMILIES
                .iter()
                .map(|name| Model::tiny(name))
                .collect(),
            limits: Vec::new(),
            extra: String::new(),
        }
    }

    /// The same with so many GPUs, found by workers of this environment.
    pub fn gpus(mut self, gpus: usize, worker_env: Vec<(String, String)>) -> Settings {
        self.gpus = gpus;
        self.worker_env.extend(worker_env);
        self
    }

    /// The same with these lines for the GPUs, one after another.
    pub fn gpu_lines(mut self, lines: &[&'static str]) -> Settings {
        self.gpu_lines = lines.to_vec();
        self
    }

    /// The same with another limit.
    pub fn limit(mut self, key: &'static str, value: u64) -> Settings {
        self.limits.push((key, value));
        self
    }

    /// The same with another model.
    pub fn model(mut self, model: Model) -> Settings {
        self.models.push(model);
        self
    }

    /// Names of the workers.
    pub fn worker_names(&self) -> Vec<String> {
        let cpus = (0..self.workers).map(|i| format!("local/cpu{i}"));
        let gpus = (0..self.gpus).map(|i| format!("local/gpu{i}"));
        cpus.chain(gpus).collect()
    }

    /// The file's text. Ports are the system's choice.
    pub fn toml(&self) -> String {
        let mut text = String::from(
            "[coordinator]\nlisten = \"127.0.0.1:0\"\nworker_listen = \"127.0.0.1:0\"\n\
             [auth]\nworker_secret_file = \"var/worker.secret\"\n\
             [[auth.tokens]]\nuser = \"admin\"\nfile = \"var/admin.token\"\n\
             [[nodes]]\nname = \"local\"\n",
        );
        let mut line = |args: std::fmt::Arguments<'_>| {
            text.write_fmt(args)
                .expect("writing to a string does not fail");
            text.push('\n');
        };
        for i in 0..self.workers {
            let memory = &self.memory;
            line(format_args!(
                "[[nodes.devices]]\nname = \"cpu{i}\"\nkind = \"cpu\"\nmemory = \"{memory}\"\nthreads = 1"
            ));
        }
        for i in 0..self.gpus {
            let more = self.gpu_lines.get(i).copied().unwrap_or_default();
            line(format_args!(
                "[[nodes.devices]]\nname = \"gpu{i}\"\nkind = \"cuda:{i}\"\n{more}"
            ));
        }
        if self.gpus > 0 {
            for (name, shards) in [("GPU", 1), ("GPU_2", 2)] {
                line(format_args!(
                    "[[workload_types]]\nname = \"{name}\"\ndevice = \"cuda\"\nshards = {shards}"
                ));
            }
        }
        let types = [
            ("CPU", 1, ""),
            ("GPU_LARGE", 1, "1 x A100 80 GB"),
            ("GPU_LARGE_2", 2, "2 x A100 80 GB"),
        ];
        for (name, shards, stands_in_for) in types {
            line(format_args!(
                "[[workload_types]]\nname = \"{name}\"\ndevice = \"cpu\"\nshards = {shards}"
            ));
            if !stands_in_for.is_empty() {
                line(format_args!("stands_in_for = \"{stands_in_for}\""));
            }
        }
        line(format_args!(
            "[[workload_types]]\nname = \"CPU_4\"\ndevice = \"cpu\"\nshards = 4"
        ));
        for model in &self.models {
            let (name, version, path) = (&model.name, model.version, model.path.display());
            line(format_args!(
                "[[models]]\nname = \"{name}\"\nversion = {version}\npath = \"{path}\""
            ));
            if let Some(kv_dtype) = model.kv_dtype {
                line(format_args!("kv_dtype = \"{kv_dtype}\""));
            }
            if let Some(quantization) = model.quantization {
                line(format_args!("quantization = \"{quantization}\""));
            }
            if let Some(context_max) = model.context_max {
                line(format_args!("context_max = {context_max}"));
            }
        }
        if !self.limits.is_empty() {
            line(format_args!("[limits]"));
        }
        for (key, value) in &self.limits {
            line(format_args!("{key} = {value}"));
        }
        line(format_args!("{}", self.extra));
        text
    }
}

impl Default for Settings {
    fn default() -> Self {
        Settings::new()
    }
}
