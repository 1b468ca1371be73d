//! How long the CUDA backend's ops take on a card, beside what the card can do: its read bandwidth and cuBLAS's peak,
//! both measured in the same run.
//!
//!     cargo run --release -p engine --features cuda --example gpu_times            the shapes of Llama 2 7B
//!     cargo run --release -p engine --features cuda --example gpu_times -- --tiny  small ones, to see that it runs
//!
//! Each op is enqueued many times over several sets of inputs, so that its weights or its cache are not in the card's L2,
//! then waited for once. An op that takes less than a launch (some 4 us) shows the launch.

use engine::backend::cuda::{CudaBackend, CudaBuf, CudaDevice, CudaLinear, CudaOptions};
use engine::backend::{
    Attention, Backend, Batch, BatchSpan, DeviceError, Draw, FloatDtype, Heads, KvDtype, KvShape,
    LinearShape, QuantBits, QuantOffset, QuantRow, QuantShape, Size,
};
use std::time::Instant;

/// Sets of inputs that are gone through in turn.
const SETS: usize = 8;
/// Rounds over the sets; the best counts.
const ROUNDS: usize = 10;
/// Columns of a quantisation group.
const GROUP: usize = 128;

/// What is timed.
struct Sizes {
    heads: Heads,
    hidden: usize,
    intermediate: usize,
    vocab: usize,
    /// Rows of a step of decodes.
    decodes: &'static [usize],
    /// Tokens of a prompt.
    prompts: &'static [usize],
    /// Tokens in the cache of each sequence that is decoded.
    contexts: &'static [usize],
    /// Side of the square product that shows the card's peak.
    square: usize,
    /// Numbers of the sum that shows its bandwidth.
    stream: usize,
}

const LLAMA_7B: Sizes = Sizes {
    heads: Heads {
        q: 32,
        kv: 32,
        width: 128,
    },
    hidden: 4096,
    intermediate: 11008,
    vocab: 32000,
    decodes: &[1, 4, 8, 16, 32, 64, 128],
    prompts: &[512, 2048],
    contexts: &[1024, 4096],
    square: 8192,
    stream: 256 << 20,
};

const TINY: Sizes = Sizes {
    heads: Heads {
        q: 4,
        kv: 2,
        width: 16,
    },
    hidden: 64,
    intermediate: 96,
    vocab: 300,
    decodes: &[1, 9],
    prompts: &[20],
    contexts: &[40],
    square: 64,
    stream: 4096,
};

/// What the card can do.
struct Limits {
    bytes_per_s: f64,
    flops_per_s: f64,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let sizes = if std::env::args().any(|argument| argument == "--tiny") {
        TINY
    } else {
        LLAMA_7B
    };
    let device = CudaDevice::open(0)?;
    let facts = device.facts();
    println!(
        "{}, compute capability {}.{}",
        facts.name, facts.compute_capability.0, facts.compute_capability.1
    );
    let options = CudaOptions {
        graphs: false,
        batch_invariant: false,
    };
    let invariant = CudaOptions {
        batch_invariant: true,
        ..options
    };
    let mut bench = Bench {
        backend: CudaBackend::new(device.clone(), options)?,
        limits: Limits {
            bytes_per_s: f64::INFINITY,
            flops_per_s: f64::INFINITY,
        },
    };
    bench.limits = bench.limits(&sizes)?;
    println!(
        "read and write {:.0} GB/s (adding two buffers), products {:.1} TFLOP/s (bf16, {} cubed)",
        bench.limits.bytes_per_s / 1e9,
        bench.limits.flops_per_s / 1e12,
        sizes.square
    );
    println!(
        "\n{:<44} {:>10} {:>10} {:>8} {:>10} {:>8}",
        "op", "time us", "GB/s", "of read", "TFLOP/s", "of peak"
    );
    bench.products(&sizes, "")?;
    bench.attention(&sizes, "")?;
    bench.rows(&sizes)?;
    bench.draws(&sizes)?;
    bench.backend = CudaBackend::new(device, invariant)?;
    bench.products(&sizes, "batch_invariant ")?;
    bench.attention(&sizes, "batch_invariant ")?;
    Ok(())
}

struct Bench {
    backend: CudaBackend,
    limits: Limits,
}

impl Bench {
    /// Seconds of one call of `op`, which is given the number of a set of inputs.
    fn seconds(
        &mut self,
        wait: &CudaBuf,
        mut op: impl FnMut(&mut CudaBackend, usize),
    ) -> Result<f64, DeviceError> {
        let mut best = f64::INFINITY;
        for _ in 0..ROUNDS {
            self.backend.read(wait, &mut [])?;
            let start = Instant::now();
            for set in 0..SETS {
                op(&mut self.backend, set);
            }
            self.backend.read(wait, &mut [])?;
            best = best.min(start.elapsed().as_secs_f64() / SETS as f64);
        }
        Ok(best)
    }

    fn show(&self, what: &str, seconds: f64, bytes: f64, flops: f64) {
        let Limits {
            bytes_per_s,
            flops_per_s,
        } = self.limits;
        println!(
            "{what:<44} {:>10.1} {:>10.0} {:>7.0}% {:>10.2} {:>7.1}%",
            seconds * 1e6,
            bytes / seconds / 1e9,
            bytes / seconds / bytes_per_s * 100.0,
            flops / seconds / 1e12,
            flops / seconds / flops_per_s * 100.0
        );
    }

    fn filled(&mut self, len: usize) -> Result<CudaBuf, DeviceError> {
        let mut buf = self.backend.alloc(len)?;
        let numbers: Vec<f32> = (0..len)
            .map(|i| (i * 37 % 256) as f32 / 128.0 - 1.0)
            .collect();
        self.backend.write(&numbers, &mut buf);
        Ok(buf)
    }

    fn limits(&mut self, sizes: &Sizes) -> Result<Limits, DeviceError> {
        let size = Size {
            rows: 1,
            width: sizes.stream,
        };
        let (mut x, y) = (
            self.backend.alloc(sizes.stream)?,
            self.backend.alloc(sizes.stream)?,
        );
        let wait = self.backend.alloc(1)?;
        let stream = self.seconds(&wait, |backend, _| backend.add(size, &mut x, &y))?;
        let side = sizes.square;
        let weights = self.matrices(side, side, None, 1)?;
        let (x, mut y) = (self.filled(side * side)?, self.backend.alloc(side * side)?);
        let product = self.seconds(&wait, |backend, _| {
            backend.linear(side, &x, &weights[0], &mut y);
        })?;
        Ok(Limits {
            bytes_per_s: 12.0 * sizes.stream as f64 / stream,
            flops_per_s: 2.0 * (side as f64).powi(3) / product,
        })
    }

    fn matrices(
        &mut self,
        n: usize,
        k: usize,
        bits: Option<QuantBits>,
        count: usize,
    ) -> Result<Vec<CudaLinear>, DeviceError> {
        let backend = &mut self.backend;
        (0..count)
            .map(|_| match bits {
                None => {
                    let dtype = FloatDtype::Bf16;
                    let row = |row: usize, out: &mut [f32]| out.fill((row % 7) as f32 / 16.0);
                    backend.pack(LinearShape { n, k, dtype }, &row, None)
                }
                Some(bits) => {
                    let shape = QuantShape {
                        n,
                        k,
                        bits,
                        group: GROUP,
                        lead: 0,
                        offset: QuantOffset::Zeros,
                        head: false,
                    };
                    let row = |row: usize, out: QuantRow<'_>| {
                        out.q.fill((row % 15) as i8);
                        out.scales.fill(0.01);
                        out.zeros.fill(0);
                    };
                    backend.pack_quantised(shape, &row, None)
                }
            })
            .collect()
    }

    /// A layer's products, at all row counts.
    fn products(&mut self, sizes: &Sizes, path: &str) -> Result<(), DeviceError> {
        let (hidden, middle) = (sizes.hidden, sizes.intermediate);
        let shapes = [
            ("qkv", sizes.heads.qkv_width(), hidden),
            ("gate up", 2 * middle, hidden),
            ("down", hidden, middle),
        ];
        let rows: Vec<usize> = sizes.decodes.iter().chain(sizes.prompts).copied().collect();
        let most = rows.iter().copied().max().unwrap_or(1);
        for (name, n, k) in shapes {
            let (x, mut out) = (self.filled(most * k)?, self.backend.alloc(most * n)?);
            let wait = self.backend.alloc(1)?;
            for bits in [None, Some(QuantBits::Int8), Some(QuantBits::Int4)] {
                let weights = self.matrices(n, k, bits, SETS)?;
                let bytes = match bits {
                    None => 2.0 * (n * k) as f64,
                    Some(QuantBits::Int8) => (n * k) as f64,
                    Some(QuantBits::Int4) => 0.5 * (n * k) as f64,
                };
                for &rows in &rows {
                    let seconds = self.seconds(&wait, |backend, set| {
                        backend.linear(rows, &x, &weights[set], &mut out);
                    })?;
                    let dtype = bits.map_or("bf16", QuantBits::name);
                    let flops = 2.0 * (rows * n * k) as f64;
                    self.show(
                        &format!("{path}{name} {n}x{k} {dtype}, {rows} rows"),
                        seconds,
                        bytes,
                        flops,
                    );
                }
            }
        }
        Ok(())
    }

    /// Decode and prefill attention of one layer, all heads of K and V and a fourth of them.
    fn attention(&mut self, sizes: &Sizes, path: &str) -> Result<(), DeviceError> {
        for kv in [sizes.heads.kv, sizes.heads.kv.div_ceil(4)] {
            let heads = Heads { kv, ..sizes.heads };
            for &context in sizes.contexts {
                for &sequences in sizes.decodes.iter().filter(|&&rows| rows <= 32) {
                    let seconds = self.attend(heads, sequences, context - 1, 1)?;
                    let bytes = (4 * sequences * context * heads.kv_width()) as f64;
                    let what = format!(
                        "{path}decode {sequences} x {context} keys, {} heads : {kv}",
                        heads.q
                    );
                    self.show(&what, seconds, bytes, 0.0);
                }
            }
            for &tokens in sizes.prompts {
                let seconds = self.attend(heads, 1, 0, tokens)?;
                // Half of the square is causal.
                let flops = 2.0 * (tokens * tokens) as f64 * heads.q_width() as f64;
                let what = format!("{path}prefill {tokens} tokens, {} heads : {kv}", heads.q);
                self.show(&what, seconds, 0.0, flops);
            }
        }
        Ok(())
    }

    fn attend(
        &mut self,
        heads: Heads,
        sequences: usize,
        position: usize,
        tokens: usize,
    ) -> Result<f64, DeviceError> {
        let pages = (position + tokens).div_ceil(16);
        let shape = KvShape {
            layers: SETS,
            blocks: 1 + sequences * pages,
            heads: heads.kv,
            head_width: heads.width,
            dtype: KvDtype::Bf16,
        };
        let mut kv = self.backend.alloc_kv(shape)?;
        let mut qkv = self.filled(sequences * tokens * heads.qkv_width())?;
        let mut out = self.backend.alloc(sequences * tokens * heads.q_width())?;
        let wait = self.backend.alloc(1)?;
        let batch = batch(sequences, pages, position, tokens);
        self.backend.begin_step(&batch);
        for layer in 0..SETS {
            self.backend
                .write_kv(&batch, heads, &mut qkv, None, &mut kv, layer);
        }
        let attention = Attention {
            heads,
            qkv: &qkv,
            scale: 0.1,
            window: None,
            slopes: None,
        };
        self.seconds(&wait, |backend, layer| {
            backend.attention(&batch, &attention, &kv, layer, &mut out);
        })
    }

    /// What is done row by row.
    fn rows(&mut self, sizes: &Sizes) -> Result<(), DeviceError> {
        for &rows in [1, 32].iter().chain(sizes.prompts) {
            let size = Size {
                rows,
                width: sizes.hidden,
            };
            let middle = Size {
                rows,
                width: sizes.intermediate,
            };
            let (x, weight) = (
                self.filled(rows * sizes.hidden)?,
                self.filled(sizes.hidden)?,
            );
            let mut y = self.backend.alloc(rows * sizes.hidden)?;
            let gate_up = self.filled(2 * rows * sizes.intermediate)?;
            let mut mid = self.backend.alloc(rows * sizes.intermediate)?;
            let wait = self.backend.alloc(1)?;
            let norm = self.seconds(&wait, |backend, _| {
                backend.rms_norm(size, &x, &weight, 1e-5, &mut y);
            })?;
            self.show(
                &format!("rms_norm, {rows} rows"),
                norm,
                6.0 * (rows * sizes.hidden) as f64,
                0.0,
            );
            let silu = self.seconds(&wait, |backend, _| {
                backend.silu_mul(middle, &gate_up, &mut mid);
            })?;
            self.show(
                &format!("silu_mul, {rows} rows"),
                silu,
                10.0 * (rows * sizes.intermediate) as f64,
                0.0,
            );
        }
        Ok(())
    }

    /// Tokens chosen on the device; the wait for them counts.
    fn draws(&mut self, sizes: &Sizes) -> Result<(), DeviceError> {
        const ROWS: usize = 32;
        let logits = self.filled(ROWS * sizes.vocab)?;
        for (name, temperature, top_k, top_p) in [
            ("greedy", 0.0, 0, 1.0),
            ("temperature", 0.8, 0, 1.0),
            ("top_k 50", 0.8, 50, 1.0),
            ("top_p 0.9", 0.8, 0, 0.9),
        ] {
            let draws: Vec<Draw> = (0..ROWS as u32)
                .map(|row| Draw {
                    row,
                    temperature,
                    top_k,
                    top_p,
                    min_p: 0.0,
                    u: 0.5,
                })
                .collect();
            let mut ids = Vec::new();
            let mut best = f64::INFINITY;
            for _ in 0..ROUNDS {
                let start = Instant::now();
                self.backend.draw(sizes.vocab, &logits, &draws);
                ids.clear();
                self.backend.drawn(&mut ids)?;
                best = best.min(start.elapsed().as_secs_f64());
            }
            let bytes = 4.0 * (ROWS * sizes.vocab) as f64;
            self.show(&format!("draw {ROWS} rows, {name}"), best, bytes, 0.0);
        }
        Ok(())
    }
}

/// Sequences of `pages` pages each, of which `tokens` tokens from `position` on are computed.
fn batch(sequences: usize, pages: usize, position: usize, tokens: usize) -> Batch {
    let rows = sequences * tokens;
    Batch {
        tokens: vec![0; rows],
        positions: (0..rows)
            .map(|row| (position + row % tokens) as u32)
            .collect(),
        spans: (0..sequences)
            .map(|i| BatchSpan {
                rows: i * tokens..(i + 1) * tokens,
                position,
                blocks: i * pages..(i + 1) * pages,
            })
            .collect(),
        blocks: (1..=(sequences * pages) as u32).collect(),
    }
}
