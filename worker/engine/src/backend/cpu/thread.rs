//! The state of a compute thread: the core it runs on, what it does with subnormal numbers.

/// Cores that a set of the system has room for.
const CORES_MAX: usize = 8 * size_of::<libc::cpu_set_t>();

/// Cores that the calling thread may run on, in rising order; none where the system does not tell.
#[must_use]
pub fn allowed_cores() -> Vec<usize> {
    // SAFETY: `cpu_set_t` is plain bits that the call fills in, and CPU_ISSET stays inside it for cores below its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Vec::new();
        }
        (0..CORES_MAX)
            .filter(|core| libc::CPU_ISSET(*core, &set))
            .collect()
    }
}

/// Lets the calling thread, and those that it starts from now on, run on these cores alone.
///
/// # Errors
/// The system's: none of the cores exists or is allowed.
pub fn bind_thread(cores: &[usize]) -> std::io::Result<()> {
    // SAFETY: `cpu_set_t` is plain bits, CPU_SET stays inside it for cores below its size, and the call reads it only.
    let result = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        for core in cores.iter().filter(|core| **core < CORES_MAX) {
            libc::CPU_SET(*core, &mut set);
        }
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

/// Pins the calling thread to a core. A core that does not exist is a warning: the work gets done without.
pub(super) fn pin(core: usize) {
    if let Err(error) = bind_thread(&[core]) {
        tracing::warn!(core, %error, "a compute thread could not be pinned");
    }
}

/// While it lives, this thread takes subnormal numbers for zero and makes none.
pub(super) struct FlushSubnormals {
    #[cfg(target_arch = "x86_64")]
    before: u32,
}

#[cfg(target_arch = "x86_64")]
impl FlushSubnormals {
    pub(super) fn new() -> FlushSubnormals {
        /// Flush-to-zero and denormals-are-zero.
        const FTZ_DAZ: u32 = 0x8040;
        let before = read_mxcsr();
        write_mxcsr(before | FTZ_DAZ);
        FlushSubnormals { before }
    }
}

#[cfg(target_arch = "x86_64")]
impl Drop for FlushSubnormals {
    fn drop(&mut self) {
        write_mxcsr(self.before);
    }
}

#[cfg(not(target_arch = "x86_64"))]
impl FlushSubnormals {
    pub(super) fn new() -> FlushSubnormals {
        FlushSubnormals {}
    }
}

#[cfg(target_arch = "x86_64")]
fn read_mxcsr() -> u32 {
    let mut value = 0u32;
    // SAFETY: stores four bytes to a live u32.
    unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &raw mut value, options(nostack)) };
    value
}

#[cfg(target_arch = "x86_64")]
fn write_mxcsr(value: u32) {
    // SAFETY: the value is what the register held before, with two bits that every x86-64 processor knows. Rust promises
    // nothing for floating-point code under another mode; that a subnormal may be taken for zero is what we ask for.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &raw const value, options(nostack)) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_thread_runs_where_it_may_and_its_children_too() {
        std::thread::spawn(|| {
            let last = allowed_cores().pop().expect("it runs somewhere");
            bind_thread(&[last]).unwrap();
            assert_eq!(allowed_cores(), [last]);
            assert_eq!(std::thread::spawn(allowed_cores).join().unwrap(), [last]);
            for nowhere in [&[][..], &[CORES_MAX - 1], &[CORES_MAX], &[usize::MAX]] {
                assert!(bind_thread(nowhere).is_err(), "{nowhere:?}");
            }
            assert_eq!(allowed_cores(), [last]);
        })
        .join()
        .unwrap();
    }
}
