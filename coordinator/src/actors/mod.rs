//! The cluster as actors: thin carriers around plain structs and the pure decisions of [`crate::policy`].
//!
//! * [`coordinator`]: roster, endpoints, placement; reconciles what the store wishes with what is there.
//! * [`endpoint`]: one endpoint's door: admission, traffic split, queue.
//! * [`replica`]: one shard group: its loading, its members, its credits.
//! * [`gateway`]: what HTTP calls; [`messages`]: all that actors say to each other; [`death`]: how a parent learns that
//!   an actor is gone.
//! * [`ticket`], [`flight`], [`link`], [`permit`]: the path of tokens. One token costs no mailbox: a link's reader puts it into the
//!   request's own bounded channel.
//! * [`allowance`]: what an endpoint's callers have used of their limits.
//! * [`keeper`]: writes lifecycle events to the store.

pub mod allowance;
pub mod coordinator;
pub mod death;
pub mod directory;
pub mod endpoint;
pub mod flight;
pub mod gateway;
pub mod keeper;
pub mod link;
pub mod messages;
pub mod meters;
pub mod permit;
pub mod record;
pub mod replica;
pub mod slot;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
pub mod ticket;
