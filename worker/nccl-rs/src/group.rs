//! Several operations as one.

use std::ffi::c_uint;
use std::sync::Arc;
use std::time::Duration;

use crate::collectives::Issue;
use crate::error::{Error, IN_PROGRESS, SUCCESS};
use crate::functions::{Functions, RawCommunicator};
use crate::shared::{Entry, Shared};

/// Operations of one communicator between `ncclGroupStart` and `ncclGroupEnd`: they are enqueued together when the
/// group ends, and advance together, so that sends and receives in it may wait for each other. Dropped, it ends all the
/// same, but nobody learns of an error.
///
/// As long as it is there, an abort from another thread waits for it: put only operations between its two ends.
pub struct Group<'a> {
    shared: &'a Arc<Shared>,
    /// Some until the group is over.
    entry: Option<Entry<'a>>,
    wait_max: Duration,
}

const END: &str = "ncclGroupEnd";

impl<'a> Group<'a> {
    pub(crate) fn start(shared: &'a Arc<Shared>, wait_max: Duration) -> Result<Group<'a>, Error> {
        let entry = shared.enter()?;
        // SAFETY: opens a group of this thread; the guard is not Send, so that it is closed on the same one.
        shared.call(&entry, "ncclGroupStart", |_| unsafe {
            (shared.library.functions().group_start)()
        })?;
        Ok(Group {
            shared,
            entry: Some(entry),
            wait_max,
        })
    }

    /// Enqueues the operations.
    ///
    /// # Errors
    /// [`Error`], of any of them.
    pub fn end(mut self) -> Result<(), Error> {
        self.finish()
    }

    fn finish(&mut self) -> Result<(), Error> {
        let Some(entry) = self.entry.take() else {
            return Ok(());
        };
        // SAFETY: closes the group that `start` opened on this thread.
        let code = unsafe { (self.shared.library.functions().group_end)() };
        match code {
            SUCCESS | IN_PROGRESS => {
                drop(entry);
                self.shared.settle(END, self.wait_max)
            }
            code => {
                let raw = entry
                    .as_ref()
                    .map_or(std::ptr::null_mut(), |handle| handle.0);
                Err(self.shared.library.failed(END, code, raw))
            }
        }
    }
}

impl Issue for Group<'_> {
    fn issue(
        &mut self,
        name: &'static str,
        call: impl FnOnce(&Functions, RawCommunicator) -> c_uint,
    ) -> Result<(), Error> {
        let entry = self.entry.as_ref().ok_or(Error::Ended)?;
        let functions = self.shared.library.functions();
        self.shared.call(entry, name, |raw| call(functions, raw))
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        let _ = self.finish();
    }
}
