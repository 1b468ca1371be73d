//! cuBLAS: matrix products of bf16 with sums in f32.
//!
//! Owns the loading of the library, of which it needs six functions that versions 12 and 13 share: cudarc would load
//! version 12 alone. The workspace is set once, behind the stream: a stream that is set later takes it away, and a product
//! that is recorded without one would allocate its own.
#![allow(unsafe_code)]

use super::driver::Stream;
use super::error::CudaError;
use super::library;
use super::pointer::{Ptr, PtrMut};
use half::bf16;
use libloading::Library;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

const NAMES: [&str; 3] = ["libcublas.so.12", "libcublas.so.13", "libcublas.so"];

type Create = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
type Destroy = unsafe extern "C" fn(*mut c_void) -> c_int;
type GetProperty = unsafe extern "C" fn(c_int, *mut c_int) -> c_int;
type SetStream = unsafe extern "C" fn(*mut c_void, *mut c_void) -> c_int;
type SetWorkspace = unsafe extern "C" fn(*mut c_void, *mut c_void, usize) -> c_int;
/// `cublasGemmEx(handle, opA, opB, m, n, k, alpha, A, typeA, lda, B, typeB, ldb, beta, C, typeC, ldc, compute, algorithm)`.
type GemmEx = unsafe extern "C" fn(
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    *const c_void,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    c_int,
    c_int,
    *const c_void,
    *mut c_void,
    c_int,
    c_int,
    c_int,
    c_int,
) -> c_int;

/// The library.
pub(super) struct BlasLibrary {
    create: Create,
    destroy: Destroy,
    get_property: GetProperty,
    set_stream: SetStream,
    set_workspace: SetWorkspace,
    gemm_ex: GemmEx,
    /// Keeps the functions above where they are.
    _library: Library,
}

impl BlasLibrary {
    /// Loads it, once per process.
    ///
    /// # Errors
    /// [`CudaError::Library`]: it is not there, or not whole.
    pub fn load() -> Result<Arc<BlasLibrary>, CudaError> {
        static FOUND: OnceLock<Option<Arc<BlasLibrary>>> = OnceLock::new();
        FOUND.get_or_init(|| BlasLibrary::open().map(Arc::new)).clone().ok_or_else(|| CudaError::Library {
            what: "cuBLAS",
            tried: NAMES.join(", "),
            help: "install it (pip install nvidia-cublas-cu12, or apt install libcublas-12-8 of NVIDIA's repository) and put its folder on LD_LIBRARY_PATH",
        })
    }

    /// Its version, told without a device.
    pub fn version(&self) -> [u32; 3] {
        // `MAJOR_VERSION`, `MINOR_VERSION`, `PATCH_LEVEL`.
        [0, 1, 2].map(|which| {
            let mut value = 0;
            // SAFETY: a number is written.
            let _ = unsafe { (self.get_property)(which, &mut value) };
            value as u32
        })
    }

    fn open() -> Option<BlasLibrary> {
        let library = library::open(NAMES)?;
        // SAFETY: these types are those of cublas_api.h, versions 12 and 13.
        unsafe {
            Some(BlasLibrary {
                create: *library.get(b"cublasCreate_v2").ok()?,
                destroy: *library.get(b"cublasDestroy_v2").ok()?,
                get_property: *library.get(b"cublasGetProperty").ok()?,
                set_stream: *library.get(b"cublasSetStream_v2").ok()?,
                set_workspace: *library.get(b"cublasSetWorkspace_v2").ok()?,
                gemm_ex: *library.get(b"cublasGemmEx").ok()?,
                _library: library,
            })
        }
    }
}

impl std::fmt::Debug for BlasLibrary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlasLibrary")
    }
}

/// cuBLAS on one stream.
#[derive(Debug)]
pub(super) struct Blas {
    library: Arc<BlasLibrary>,
    handle: *mut c_void,
    /// Where its workspace is.
    workspace: Option<u64>,
    /// Outlives the handle.
    stream: Arc<Stream>,
}

// SAFETY: a handle may be used by one thread after another; `&mut self` sees to it.
unsafe impl Send for Blas {}

impl Blas {
    pub fn new(library: &Arc<BlasLibrary>, stream: &Arc<Stream>) -> Result<Blas, CudaError> {
        stream.context().bind()?;
        let mut handle = null_mut();
        // SAFETY: the handle is written to `handle`.
        check("cublasCreate", unsafe { (library.create)(&mut handle) })?;
        let blas = Blas {
            library: Arc::clone(library),
            handle,
            workspace: None,
            stream: Arc::clone(stream),
        };
        // SAFETY: both live.
        check("cublasSetStream", unsafe {
            (library.set_stream)(handle, stream.raw())
        })?;
        Ok(blas)
    }

    /// Gives it memory of its own, which the caller keeps for as long as this lives.
    pub fn set_workspace(&mut self, start: u64, bytes: u64) -> Result<(), CudaError> {
        if self.workspace == Some(start) {
            return Ok(());
        }
        // SAFETY: the caller keeps the memory; 256 bytes divide its address.
        let result = unsafe {
            (self.library.set_workspace)(self.handle, start as *mut c_void, bytes as usize)
        };
        check("cublasSetWorkspace", result)?;
        self.workspace = Some(start);
        Ok(())
    }

    /// `out[r][i] = sum_j x[r][j] * w[i][j]` of `x [rows, k]`, `w [n, ld]` and `out [rows, out_width]`, of which `n` columns
    /// are written. In f32, by the library's own choice of algorithm.
    pub fn product(
        &mut self,
        shape: Product,
        x: Ptr<bf16>,
        w: Ptr<bf16>,
        out: PtrMut<f32>,
    ) -> Result<(), CudaError> {
        /// `CUBLAS_OP_N`, `CUBLAS_OP_T`.
        const AS_IS: c_int = 0;
        const TRANSPOSED: c_int = 1;
        /// `CUDA_R_16BF`, `CUDA_R_32F`, `CUBLAS_COMPUTE_32F`, `CUBLAS_GEMM_DEFAULT`.
        const BF16: c_int = 14;
        const F32: c_int = 0;
        const SUMS_IN_F32: c_int = 68;
        const DEFAULT: c_int = -1;
        self.stream.context().bind()?;
        let Product {
            rows,
            n,
            k,
            ld,
            out_width,
        } = shape;
        let (one, zero) = (1.0f32, 0.0f32);
        // Columns come first there: our rows are its columns, so it computes out^T [n, rows] = w x^T.
        // SAFETY: the places hold these shapes: `Linear` and `CudaBuf` give them out for no more than they keep.
        let result = unsafe {
            (self.library.gemm_ex)(
                self.handle,
                TRANSPOSED,
                AS_IS,
                n as c_int,
                rows as c_int,
                k as c_int,
                (&raw const one).cast(),
                w.address() as *const c_void,
                BF16,
                ld as c_int,
                x.address() as *const c_void,
                BF16,
                k as c_int,
                (&raw const zero).cast(),
                out.address() as *mut c_void,
                F32,
                out_width as c_int,
                SUMS_IN_F32,
                DEFAULT,
            )
        };
        check("cublasGemmEx", result)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        let _ = self.stream.context().bind();
        // SAFETY: destroyed once.
        let _ = unsafe { (self.library.destroy)(self.handle) };
    }
}

/// The shape of a product.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub rows: usize,
    /// Rows of the matrix.
    pub n: usize,
    /// Columns of both.
    pub k: usize,
    /// Numbers from one row of the matrix to the next.
    pub ld: usize,
    /// Numbers from one row of the result to the next.
    pub out_width: usize,
}

fn check(call: &'static str, status: c_int) -> Result<(), CudaError> {
    let name = match status {
        0 => return Ok(()),
        1 => "the library is not initialised",
        3 => "an allocation failed",
        7 => "a value is not valid",
        8 => "the device lacks a feature",
        13 => "the product could not be enqueued",
        14 => "an internal error",
        15 => "not supported",
        _ => "an unknown status",
    };
    Err(CudaError::Call {
        call,
        error: format!("{name} ({status})"),
    })
}
