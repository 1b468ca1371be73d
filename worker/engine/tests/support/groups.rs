//! Groups of two ranks of one process, as two workers form them.

use engine::collective::host::{
    GroupBuilder, GroupId, GroupKey, GroupListener, HostGroup, Membership, Transport, host_id, join,
};
use std::net::TcpListener;
use std::time::Duration;

/// Long enough that only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(120);

/// Ranks 0 and 1 of a group's generation.
pub fn host_pair(generation: u64, transport: Transport) -> [HostGroup; 2] {
    let listener = GroupListener::start(TcpListener::bind("127.0.0.1:0").expect("a port"))
        .expect("a listener");
    let member = |rank| Membership {
        id: GroupId {
            group: 1,
            generation,
        },
        rank,
        ranks: 2,
        key: GroupKey::new(&[7; 32]).expect("long enough"),
        host: host_id(),
        transport,
        wait_max: PATIENCE,
    };
    std::thread::scope(|scope| {
        let second = scope.spawn(|| join(listener.address(), &member(1), PATIENCE).expect("joins"));
        let leader = GroupBuilder::new(&listener, member(0))
            .expect("a group")
            .lead(PATIENCE)
            .expect("forms");
        [leader, second.join().expect("no panic")]
    })
}
