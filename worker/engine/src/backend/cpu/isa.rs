//! Which instructions the kernels use: found out once, then carried as a value that proves they exist.
//!
//! Owns detection and the step from a value to code compiled for it ([`Isa::run`]). The instructions themselves stand
//! in [`super::simd`].

use std::sync::LazyLock;

use super::dots::Dots;
#[cfg(target_arch = "x86_64")]
use super::dots::Vnni;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Portable, Simd};

/// An instruction path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// As the next, and 32 products of bf16 per instruction: activations are rounded to bf16 where they meet bf16 weights.
    Avx512Bf16,
    /// As the next, and VNNI: 64 products of bytes per instruction.
    Avx512Vnni,
    /// AVX-512 F, BW, VL and DQ: 16 numbers per instruction.
    Avx512,
    /// AVX2, FMA and F16C: 8 numbers per instruction.
    Avx2,
    /// Whatever the compiler makes of plain loops on any processor.
    Portable,
}

impl Path {
    /// All paths, the fastest first.
    pub const ALL: [Path; 5] = [
        Path::Avx512Bf16,
        Path::Avx512Vnni,
        Path::Avx512,
        Path::Avx2,
        Path::Portable,
    ];

    /// Its name in logs and the numerics id.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Path::Avx512Bf16 => "avx512-bf16",
            Path::Avx512Vnni => "avx512-vnni",
            Path::Avx512 => "avx512",
            Path::Avx2 => "avx2",
            Path::Portable => "portable",
        }
    }

    fn is_here(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 => {
                is_x86_feature_detected!("avx512bf16") && Path::Avx512Vnni.is_here()
            }
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Vnni => is_x86_feature_detected!("avx512vnni") && Path::Avx512.is_here(),
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && Path::Avx2.is_here()
            }
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Path::Avx512Bf16 | Path::Avx512Vnni | Path::Avx512 | Path::Avx2 => false,
            Path::Portable => true,
        }
    }

    /// Whether it is faster than the paths behind it, wherever it exists: AMD's processors multiply pairs of bf16 at twice
    /// the rate of f32, Intel's at half of it.
    fn pays(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 => {
                let found = std::arch::x86_64::__cpuid(0);
                let vendor = [found.ebx, found.edx, found.ecx].map(u32::to_le_bytes);
                vendor.as_flattened() == b"AuthenticAMD"
            }
            _ => true,
        }
    }
}

/// An instruction path that this processor has: there is no other way to make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Isa(Path);

impl Isa {
    /// The fastest path of this processor.
    #[must_use]
    pub fn detect() -> Isa {
        // Asking a virtual processor what it is takes longer than a small kernel.
        static DETECTED: LazyLock<Isa> = LazyLock::new(|| {
            Path::ALL
                .into_iter()
                .filter(|path| path.pays())
                .find_map(Isa::new)
                .unwrap_or(Isa(Path::Portable))
        });
        *DETECTED
    }

    /// This path, if the processor has it.
    #[must_use]
    pub fn new(path: Path) -> Option<Isa> {
        path.is_here().then_some(Isa(path))
    }

    /// Which path it is.
    #[must_use]
    pub fn path(self) -> Path {
        self.0
    }

    /// Whether bf16 weights meet activations rounded to bf16, in products of pairs.
    pub(super) fn multiplies_pairs(self) -> bool {
        self.0 == Path::Avx512Bf16
    }

    /// Runs plain loops compiled for this path: same bits, more numbers per instruction. What `body` calls has to be
    /// `#[inline(always)]`.
    pub fn vectorise<R>(self, body: impl FnOnce() -> R) -> R {
        self.run(Loops(body))
    }

    /// Runs a kernel compiled for this path.
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
        fn avx512<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: this function has the features of `Avx512`.
            unsafe { kernel.run::<Avx512>() }
        }

        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn avx2<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: this function has the features of `Avx2`.
            unsafe { kernel.run::<Avx2>() }
        }

        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this path exists, so the processor has its features.
            Path::Avx512Bf16 | Path::Avx512Vnni | Path::Avx512 => unsafe { avx512(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Path::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: the portable path needs no feature.
            _ => unsafe { kernel.run::<Portable>() },
        }
    }

    /// Runs a kernel compiled with products of pairs.
    ///
    /// # Panics
    /// The path has none: see [`Isa::multiplies_pairs`].
    pub(super) fn run_pairs<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
        fn avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
            // SAFETY: this function has the features of `Avx512`, and products of pairs.
            unsafe { kernel.run::<Avx512>() }
        }

        match self.0 {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` of this path exists, so the processor has its features.
            Path::Avx512Bf16 => unsafe { avx512_bf16(kernel) },
            path => {
                drop(kernel);
                unreachable!("{path:?} has no products of pairs")
            }
        }
    }

    /// Rows of activations that a float product of this path takes at a time.
    pub(super) fn float_rows(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 | Path::Avx512Vnni | Path::Avx512 => <Avx512 as Simd>::ROWS,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => <Avx2 as Simd>::ROWS,
            _ => <Portable as Simd>::ROWS,
        }
    }

    /// Rows of activations that an integer product of this path takes at a time.
    pub(super) fn dot_rows(self) -> usize {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Path::Avx512Bf16 | Path::Avx512Vnni => Vnni::ROWS,
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => <Avx512 as Dots>::ROWS,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => <Avx2 as Dots>::ROWS,
            _ => <Portable as Dots>::ROWS,
        }
    }

    /// Runs an integer product with this path's instructions.
    pub(super) fn run_dots<K: DotKernel>(self, kernel: K) {
        // SAFETY: an `Isa` of this path exists, so the processor has its features.
        unsafe {
            match self.0 {
                #[cfg(target_arch = "x86_64")]
                Path::Avx512Bf16 | Path::Avx512Vnni => kernel.run::<Vnni>(),
                #[cfg(target_arch = "x86_64")]
                Path::Avx512 => kernel.run::<Avx512>(),
                #[cfg(target_arch = "x86_64")]
                Path::Avx2 => kernel.run::<Avx2>(),
                _ => kernel.run::<Portable>(),
            }
        }
    }
}

/// An integer product with its arguments, written once for all paths: the loops around [`Dots::tile`], which is compiled
/// for each.
pub(super) trait DotKernel {
    /// Computes.
    ///
    /// # Safety
    /// The processor has the features of `D`.
    unsafe fn run<D: Dots>(self);
}

/// Loops that leave the choice of instructions to the compiler.
struct Loops<F>(F);

impl<R, F: FnOnce() -> R> Kernel for Loops<F> {
    type Output = R;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> R {
        (self.0)()
    }
}

/// A kernel with its arguments, written once for all paths.
pub(super) trait Kernel {
    /// What it gives.
    type Output;

    /// Computes. Implementations are `#[inline(always)]`: the code takes on the instructions of the function that it is
    /// inlined into.
    ///
    /// # Safety
    /// The processor has the features of `S`, and the caller is compiled with them.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}
