//! What happens to a call that its served entity cannot take: another one may, in the order of the configuration.

use crate::api::ErrorKind;

/// Whether the same call may succeed on another served entity.
pub fn helps(kind: ErrorKind) -> bool {
    match kind {
        ErrorKind::Overloaded | ErrorKind::Unavailable | ErrorKind::Internal => true,
        // The call is wrong, or its time is up, or it is not about the entity at all.
        ErrorKind::InvalidParameter
        | ErrorKind::BadRequest
        | ErrorKind::Malformed
        | ErrorKind::PermissionDenied
        | ErrorKind::NotFound
        | ErrorKind::AlreadyExists
        | ErrorKind::Conflict
        | ErrorKind::Deadline
        | ErrorKind::NotImplemented => false,
    }
}

/// The first entity that was not tried, whatever its share of the traffic.
pub fn next<'a>(mut names: impl Iterator<Item = &'a str>, tried: &[String]) -> Option<usize> {
    names.position(|name| !tried.iter().any(|tried| tried == name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entity_is_tried_once_in_order() {
        let names = ["a", "b", "c"];
        let mut tried = vec!["b".to_owned()];
        let mut order = Vec::new();
        while let Some(at) = next(names.into_iter(), &tried) {
            order.push(at);
            tried.push(names[at].to_owned());
        }
        assert_eq!(order, [0, 2]);
    }

    #[test]
    fn only_what_another_entity_may_do_better_is_tried_again() {
        assert!(helps(ErrorKind::Overloaded) && helps(ErrorKind::Unavailable));
        assert!(!helps(ErrorKind::BadRequest) && !helps(ErrorKind::Deadline));
    }
}
