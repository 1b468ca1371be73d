//! NVRTC: compiles the kernels at start, for a device that no embedded cubin serves.
//!
//! Owns the loading of the library and its eight functions. The sources need no file of the CUDA toolkit.
#![allow(unsafe_code)]

use super::error::CudaError;
use super::kernels::Source;
use super::library;
use libloading::Library;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::null_mut;

const NAMES: [&str; 3] = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"];

type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
/// `nvrtcCreateProgram(program, source, name, headers, texts, names)`.
type Create = unsafe extern "C" fn(
    *mut *mut c_void,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Destroy = unsafe extern "C" fn(*mut *mut c_void) -> c_int;
type Compile = unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> c_int;
type Size = unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int;
type Take = unsafe extern "C" fn(*mut c_void, *mut c_char) -> c_int;

/// The version, where the library is there.
pub(super) fn version() -> Option<(u32, u32)> {
    let library = library::open(NAMES)?;
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the type is that of nvrtc.h; two numbers are written.
    let status = unsafe { library.get::<Version>(b"nvrtcVersion").ok()?(&mut major, &mut minor) };
    (status == 0).then_some((major as u32, minor as u32))
}

/// Compiles a file of kernels to a cubin.
///
/// # Errors
/// [`CudaError::Architecture`]: NVRTC is not there, or does not know the architecture.
pub(super) fn compile(
    source: &Source,
    headers: &[(&str, &str)],
    (major, minor): (u32, u32),
) -> Result<Vec<u8>, CudaError> {
    let refused = |reason: String| CudaError::Architecture {
        major,
        minor,
        reason,
    };
    let library = library::open(NAMES).ok_or_else(|| {
        refused(format!(
            "there are none in this program, and NVRTC, which would compile them, is not there (tried {}); pip install nvidia-cuda-nvrtc-cu12 and put its folder on LD_LIBRARY_PATH",
            NAMES.join(", ")
        ))
    })?;
    cubin(
        &library,
        source,
        headers,
        &format!("--gpu-architecture=sm_{major}{minor}"),
    )
    .map_err(refused)
}

fn cubin(
    library: &Library,
    source: &Source,
    headers: &[(&str, &str)],
    architecture: &str,
) -> Result<Vec<u8>, String> {
    let text = |text: &str| CString::new(text).map_err(|_| "a source holds a zero byte".to_owned());
    let names: Vec<CString> = headers
        .iter()
        .map(|(name, _)| text(name))
        .collect::<Result<_, _>>()?;
    let texts: Vec<CString> = headers
        .iter()
        .map(|(_, of)| text(of))
        .collect::<Result<_, _>>()?;
    let pointers = |of: &[CString]| of.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
    let (source_text, source_name) = (text(source.text)?, text(&format!("{}.cu", source.name))?);
    let options = [
        text("--std=c++17")?,
        text("--device-as-default-execution-space")?,
        text(architecture)?,
    ];
    let missing = |error: libloading::Error| format!("NVRTC is not whole: {error}");
    // SAFETY: the types are those of nvrtc.h; all texts outlive the calls; buffers have the lengths that NVRTC told.
    unsafe {
        let create = library
            .get::<Create>(b"nvrtcCreateProgram")
            .map_err(missing)?;
        let destroy = library
            .get::<Destroy>(b"nvrtcDestroyProgram")
            .map_err(missing)?;
        let compile = library
            .get::<Compile>(b"nvrtcCompileProgram")
            .map_err(missing)?;
        let mut program = null_mut();
        let status = create(
            &mut program,
            source_text.as_ptr(),
            source_name.as_ptr(),
            headers.len() as c_int,
            pointers(&texts).as_ptr(),
            pointers(&names).as_ptr(),
        );
        if status != 0 {
            return Err(format!("NVRTC takes no program ({status})"));
        }
        let compiled = compile(program, options.len() as c_int, pointers(&options).as_ptr());
        let result = if compiled == 0 {
            take(library, program, b"nvrtcGetCUBINSize", b"nvrtcGetCUBIN")
        } else {
            take(
                library,
                program,
                b"nvrtcGetProgramLogSize",
                b"nvrtcGetProgramLog",
            )
            .and_then(|log| {
                let log = String::from_utf8_lossy(&log);
                Err(format!(
                    "NVRTC refuses {}.cu ({compiled}): {}",
                    source.name,
                    log.trim_end_matches('\0').trim()
                ))
            })
        };
        destroy(&mut program);
        result
    }
}

/// Asks for a result's length, then for the result.
///
/// # Safety
/// `program` lives; `size` and `get` are the names of a pair of NVRTC's functions.
unsafe fn take(
    library: &Library,
    program: *mut c_void,
    size: &[u8],
    get: &[u8],
) -> Result<Vec<u8>, String> {
    let missing = |error: libloading::Error| format!("NVRTC is not whole: {error}");
    // SAFETY: the caller's; the buffer has the length that NVRTC told.
    unsafe {
        let mut bytes = 0;
        let mut status = library.get::<Size>(size).map_err(missing)?(program, &mut bytes);
        let mut out = vec![0u8; bytes];
        if status == 0 {
            status = library.get::<Take>(get).map_err(missing)?(program, out.as_mut_ptr().cast());
        }
        if status == 0 {
            Ok(out)
        } else {
            Err(format!("NVRTC gives no result ({status})"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::kernels::{HEADERS, SOURCES};
    use super::*;
    use std::path::{Path, PathBuf};

    /// The NVRTC of `scripts/build-kernels`, which `scripts/check` runs before the tests.
    fn pinned() -> Option<PathBuf> {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
        let python = std::fs::read_dir(target.join("kernels-venv/lib")).ok()?;
        python
            .filter_map(Result::ok)
            .map(|entry| {
                entry
                    .path()
                    .join("site-packages/nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
            })
            .find(|library| library.exists())
    }

    #[test]
    fn a_device_without_cubins_gets_its_kernels_from_the_embedded_sources() {
        let Some(path) = pinned() else {
            eprintln!("left out: no NVRTC here; scripts/build-kernels fetches it");
            return;
        };
        // SAFETY: NVIDIA's libraries start no thread and change no state of the process when they are loaded.
        let library = unsafe { Library::new(path) }.expect("it loads");
        for name in ["rows", "gemm_mma"] {
            let source = SOURCES.iter().find(|source| source.name == name);
            let made = cubin(
                &library,
                source.expect("a source"),
                HEADERS,
                "--gpu-architecture=sm_100",
            );
            let made = made.expect("it compiles");
            assert!(made.starts_with(b"\x7fELF"), "{name}");
        }
        let broken = Source {
            text: "KERNEL(1, x, (int n)) { nonsense }",
            ..*SOURCES
                .iter()
                .find(|source| source.name == "rows")
                .expect("a source")
        };
        let refused = cubin(&library, &broken, HEADERS, "--gpu-architecture=sm_100");
        let error = refused.expect_err("it is no C++");
        assert!(
            error.contains("NVRTC refuses rows.cu") && error.contains("error"),
            "{error}"
        );
    }
}
