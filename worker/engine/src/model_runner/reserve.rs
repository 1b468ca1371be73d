//! Waiting for memory that a device has, and does not give yet.
//!
//! What a plan grants a model is there, but a driver takes seconds to free what a process held that was killed.

use crate::backend::DeviceError;
use std::time::{Duration, Instant};

/// A driver frees what a dead process held within this time.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(10);
/// It is asked so often.
const PAUSE: Duration = Duration::from_millis(200);

/// Asks for memory until it is there, at most `within`.
///
/// # Errors
/// The last answer, or at once one that says something else than that there is no memory.
pub(super) fn patiently(
    within: Duration,
    mut ask: impl FnMut() -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match ask() {
            Err(DeviceError::OutOfMemory { .. }) if !left.is_zero() => {
                std::thread::sleep(PAUSE.min(left));
            }
            answer => return answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: DeviceError = DeviceError::OutOfMemory { bytes: 7 };

    /// What comes of these answers, and how often it was asked.
    fn after(
        within: Duration,
        answers: &[Result<(), DeviceError>],
    ) -> (Result<(), DeviceError>, usize) {
        let mut asked = 0;
        let answer = patiently(within, || {
            asked += 1;
            answers[(asked - 1).min(answers.len() - 1)].clone()
        });
        (answer, asked)
    }

    #[test]
    fn memory_that_comes_late_is_waited_for() {
        let answers = [Err(NONE), Err(NONE), Ok(())];
        assert_eq!(after(Duration::from_secs(60), &answers), (Ok(()), 3));
    }

    #[test]
    fn memory_that_does_not_come_is_given_up() {
        assert_eq!(after(Duration::ZERO, &[Err(NONE)]), (Err(NONE), 1));
        let (answer, asked) = after(Duration::from_millis(1), &[Err(NONE)]);
        assert!(answer == Err(NONE) && asked >= 2, "{answer:?} {asked}");
    }

    #[test]
    fn what_waiting_does_not_help_is_told_at_once() {
        let broken = DeviceError::Failed("broken".into());
        let answers = [Err(broken.clone())];
        assert_eq!(after(Duration::from_secs(60), &answers), (Err(broken), 1));
    }
}
