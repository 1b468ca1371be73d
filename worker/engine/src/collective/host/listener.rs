//! The one port on which a worker process meets the members of all groups it leads.
//!
//! Owns accepting, authenticating and handing each connection to the group it belongs to. A connection that is not a
//! member of an expected group is closed and costs nobody else anything: handshakes run beside each other, each with
//! a deadline, so many at a time and no more. A member that comes before its leader was told of the group is sent away
//! and comes again.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::form::FormError;
use super::frame::{self, FrameError};
use super::handshake::{self, Hello};
use super::{GroupId, GroupKey, Membership};

/// Handshakes that run at one time; a connection beyond is closed at once and its member comes again.
const HANDSHAKES_MAX: usize = 64;
/// A handshake takes no longer: it is two round trips.
const HANDSHAKE_MAX: Duration = Duration::from_secs(3);

/// Accepts the members of the groups that this process leads. Stops when dropped.
pub struct GroupListener {
    shared: Arc<Shared>,
    address: SocketAddr,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    expected: Mutex<HashMap<GroupId, Expected>>,
    handshakes: AtomicUsize,
    stopping: AtomicBool,
}

/// A group that is forming.
struct Expected {
    key: GroupKey,
    ranks: u32,
    arrivals: SyncSender<Arrival>,
}

/// An authenticated member.
pub(super) struct Arrival {
    pub(super) hello: Hello,
    pub(super) stream: TcpStream,
}

/// A group's entry at the listener; gone when dropped.
pub(super) struct Expectation {
    shared: Arc<Shared>,
    id: GroupId,
    pub(super) arrivals: Receiver<Arrival>,
}

impl GroupListener {
    /// Starts to accept on `listener`.
    ///
    /// # Errors
    /// The listener's address cannot be read or the thread cannot start.
    pub fn start(listener: TcpListener) -> io::Result<GroupListener> {
        let shared = Arc::new(Shared::default());
        let address = listener.local_addr()?;
        let thread = std::thread::Builder::new()
            .name("group-listener".into())
            .spawn({
                let shared = Arc::clone(&shared);
                move || accept(&listener, &shared)
            })?;
        Ok(GroupListener {
            shared,
            address,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Lets the members of a group in from now on.
    pub(super) fn expect(&self, member: &Membership) -> Result<Expectation, FormError> {
        let mut expected = self.shared.expected();
        if expected.contains_key(&member.id) {
            let GroupId { group, generation } = member.id;
            return Err(FormError::Invalid(format!(
                "generation {generation} of group {group} is forming already"
            )));
        }
        // Room for members that come twice; the builder takes them out as they come.
        let (sender, arrivals) = sync_channel(2 * member.ranks as usize);
        expected.insert(
            member.id,
            Expected {
                key: member.key.clone(),
                ranks: member.ranks,
                arrivals: sender,
            },
        );
        Ok(Expectation {
            shared: Arc::clone(&self.shared),
            id: member.id,
            arrivals,
        })
    }
}

impl Drop for GroupListener {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let mut address = self.address;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() {
                Ipv4Addr::LOCALHOST.into()
            } else {
                Ipv6Addr::LOCALHOST.into()
            });
        }
        // The accepting thread looks at `stopping` when somebody calls.
        let woken = TcpStream::connect_timeout(&address, HANDSHAKE_MAX).is_ok();
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        self.shared.expected().remove(&self.id);
    }
}

impl Shared {
    fn expected(&self) -> MutexGuard<'_, HashMap<GroupId, Expected>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    loop {
        let accepted = listener.accept();
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        match accepted {
            Ok((stream, peer)) => spawn_handshake(stream, peer, shared),
            Err(error) => {
                tracing::warn!(%error, "accepting a rank failed");
                // Out of file descriptors, most likely: do not burn the core while it lasts.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn spawn_handshake(stream: TcpStream, peer: SocketAddr, shared: &Arc<Shared>) {
    if shared.handshakes.fetch_add(1, Ordering::SeqCst) >= HANDSHAKES_MAX {
        shared.handshakes.fetch_sub(1, Ordering::SeqCst);
        tracing::warn!(%peer, "too many handshakes at a time, connection closed");
        return;
    }
    let in_thread = Arc::clone(shared);
    let spawned = std::thread::Builder::new()
        .name("group-handshake".into())
        .spawn(move || {
            if let Err(reason) = handshake(stream, &in_thread) {
                tracing::warn!(%peer, reason, "a connection to the group port was closed");
            }
            in_thread.handshakes.fetch_sub(1, Ordering::SeqCst);
        });
    if let Err(error) = spawned {
        shared.handshakes.fetch_sub(1, Ordering::SeqCst);
        tracing::warn!(%peer, %error, "no thread for a handshake, connection closed");
    }
}

fn handshake(stream: TcpStream, shared: &Shared) -> Result<(), String> {
    let deadline = Instant::now() + HANDSHAKE_MAX;
    frame::prepare(&stream).map_err(|error| error.to_string())?;
    let pending = handshake::read_hello(&stream, deadline).map_err(describe)?;
    let Hello {
        id, rank, ranks, ..
    } = pending.hello;
    let expected = shared
        .expected()
        .get(&id)
        .map(|group| (group.key.clone(), group.ranks));
    let Some((key, expected_ranks)) = expected else {
        pending.refuse_unknown_group();
        return Ok(());
    };
    if ranks != expected_ranks || rank == 0 || rank >= ranks {
        return Err(format!(
            "a hello as rank {rank} of {ranks} to a group of {expected_ranks}"
        ));
    }
    let hello = pending.authenticate(&key).map_err(describe)?;
    let arrivals = shared
        .expected()
        .get(&id)
        .map(|group| group.arrivals.clone());
    match arrivals.map(|arrivals| arrivals.try_send(Arrival { hello, stream })) {
        Some(Ok(())) => Ok(()),
        _ => Err("the group it belongs to has formed or has given up".into()),
    }
}

fn describe(error: FrameError) -> String {
    match error {
        FrameError::Closed(reason) => reason,
        FrameError::TimedOut => "the handshake took too long".into(),
        FrameError::Lost { rank, reason } => format!("rank {rank} is lost: {reason}"),
        FrameError::Unexpected(what) => what,
    }
}
