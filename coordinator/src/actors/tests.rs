//! The actors against workers that speak the true protocol.

mod deploy;
mod faults;
mod limits;
mod provisioned;
mod requests;

/// Makes the actor that gets it panic.
#[derive(actix::Message)]
#[rtype(result = "()")]
struct Panic;

macro_rules! panics {
    ($($actor:ty),*) => {$(
        impl actix::Handler<Panic> for $actor {
            type Result = ();
            fn handle(&mut self, _: Panic, _: &mut Self::Context) {
                panic!("a test asked for it");
            }
        }
    )*};
}
panics!(
    super::coordinator::CoordinatorActor,
    super::endpoint::EndpointActor,
    super::replica::ReplicaActor
);
