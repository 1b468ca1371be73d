//! How a parent learns that an actor is gone: a value inside the actor that speaks when it is dropped.
//!
//! actix's Supervisor does not revive an actor whose handler panicked; the drop of the actor's state is the one thing
//! that happens on every way out.

use actix::Recipient;

use super::messages::{Died, Who};

/// Held by an actor; tells its parent when the actor is over, however it ended.
pub struct DeathNotice {
    parent: Recipient<Died>,
    who: Who,
    orderly: bool,
}

impl DeathNotice {
    /// A notice for `parent` about `who`.
    pub fn new(parent: Recipient<Died>, who: Who) -> Self {
        DeathNotice {
            parent,
            who,
            orderly: false,
        }
    }

    /// The actor ends as it should; without this call its end counts as a panic.
    pub fn orderly(&mut self) {
        self.orderly = true;
    }
}

impl Drop for DeathNotice {
    fn drop(&mut self) {
        // One message per actor, and it must arrive: the mailbox's bound does not apply.
        self.parent.do_send(Died {
            who: self.who.clone(),
            orderly: self.orderly,
        });
    }
}
