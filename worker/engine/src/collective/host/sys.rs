//! The system calls that the standard library lacks: waiting on a word of shared memory, TCP keep-alive, and looking at a
//! connection that another thread uses.
//!
//! Owns no state and no policy.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

/// Sleeps until another process wakes `word`, its value is no longer `seen`, or `wait_max` has passed. May also return
/// for no reason.
pub(super) fn futex_wait(word: &AtomicU32, seen: u32, wait_max: Duration) {
    let timeout = libc::timespec {
        tv_sec: wait_max.as_secs() as libc::time_t,
        tv_nsec: libc::c_long::from(wait_max.subsec_nanos() as i32),
    };
    // SAFETY: `word` is a live, aligned u32 and `timeout` outlives the call; FUTEX_WAIT reads both and writes nothing.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            seen,
            &timeout,
        )
    };
}

/// Wakes all that sleep on `word`.
pub(super) fn futex_wake_all(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address of a live word as a key and touches no memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Takes `bytes` of memory for a file of shared memory, so that a full `/dev/shm` is an error here and not a SIGBUS
/// at the first touch.
pub(super) fn reserve(file: &std::fs::File, bytes: usize) -> io::Result<()> {
    // SAFETY: the descriptor is open for writing as long as `file` lives.
    let error = unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as libc::off_t) };
    if error == 0 {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(error))
    }
}

/// Makes the kernel probe an idle connection, so that a machine that lost its power ends it within 11 seconds.
pub(super) fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    let options = [
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 5),
        (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 2),
        (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 3),
    ];
    for (level, name, value) in options {
        let value: libc::c_int = value;
        // SAFETY: the option's value is a c_int that outlives the call, and its size is passed.
        let result = unsafe {
            libc::setsockopt(
                stream.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Which of the connections the other end has closed or lost, also behind bytes that nobody has read yet. Waits for the
/// first such one, at most `wait_max`.
pub(super) fn closed(streams: &[TcpStream], wait_max: Duration) -> io::Result<Vec<bool>> {
    let mut polls: Vec<libc::pollfd> = streams
        .iter()
        .map(|stream| libc::pollfd {
            fd: stream.as_raw_fd(),
            events: libc::POLLRDHUP,
            revents: 0,
        })
        .collect();
    let timeout = wait_max.as_millis().min(i32::MAX as u128) as libc::c_int;
    // SAFETY: the array is as long as is said and outlives the call.
    let count = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(polls.iter().map(|poll| poll.revents != 0).collect())
}

/// Copies unread bytes of a connection to `bytes`, without waiting and leaving them unread; gives their number.
pub(super) fn peek(stream: &TcpStream, bytes: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the slice is as long as is said and outlives the call.
    let count = unsafe {
        libc::recv(
            stream.as_raw_fd(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
            flags,
        )
    };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}
