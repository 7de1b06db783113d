//! How GPU pages that are left over are shared out as buffering.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// What one request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Mandatory pages of a row. They are not shared out: every request has them.
    pub mandatory: usize,
    /// Buffering pages that a row wants.
    pub wanted: usize,
}

/// The buffering pages of a row of each request, in the order of `shares`, when every row of every request can
/// have `pages` more in total: max-min fair by the ratio of buffering to mandatory pages.
///
/// Page by page, the request of the smallest ratio gets the next one (of equals, the first) until it has what it
/// wants. Seen from a shortage: the request of the largest ratio gives first, nobody gives while another has a
/// larger ratio, and mandatory pages are never touched. It is a function of the requests and the pages alone, so
/// what a request gives up under pressure comes back when the pressure ends, whatever happened in between.
pub fn share_out(shares: &[Share], mut pages: usize) -> Vec<usize> {
    let mut given = vec![0; shares.len()];
    let wants = |(index, share): (usize, &Share)| {
        let Share { mandatory, wanted } = *share;
        (wanted > 0).then_some(Claim { given: 0, mandatory, wanted, index })
    };
    let mut claims: BinaryHeap<_> = shares.iter().enumerate().filter_map(wants).collect();
    while pages > 0
        && let Some(mut claim) = claims.pop()
    {
        claim.given += 1;
        pages -= 1;
        given[claim.index] = claim.given;
        if claim.given < claim.wanted {
            claims.push(claim);
        }
    }
    given
}

/// A request that wants more. The greatest is the next to be given a page.
#[derive(Debug, PartialEq, Eq)]
struct Claim {
    given: usize,
    mandatory: usize,
    wanted: usize,
    index: usize,
}

impl Ord for Claim {
    fn cmp(&self, other: &Self) -> Ordering {
        // given / mandatory, without dividing; a request without mandatory pages comes last.
        let (own, others) =
            (self.given as u128 * other.mandatory as u128, other.given as u128 * self.mandatory as u128);
        let none = |claim: &Self| claim.mandatory == 0;
        none(other).cmp(&none(self)).then(others.cmp(&own)).then(other.index.cmp(&self.index))
    }
}

impl PartialOrd for Claim {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(mandatory: usize, wanted: usize) -> Share {
        Share { mandatory, wanted }
    }

    #[test]
    fn enough_for_all_gives_all_what_they_want() {
        assert_eq!(share_out(&[share(3, 15), share(10, 50), share(0, 0)], 65), [15, 50, 0]);
        assert_eq!(share_out(&[share(3, 15), share(10, 50)], 1 << 40), [15, 50]);
        assert_eq!(share_out(&[], 5), [0; 0]);
    }

    #[test]
    fn a_shortage_falls_on_the_largest_ratio() {
        assert_eq!(share_out(&[share(10, 50), share(10, 50)], 60), [30, 30]);
        assert_eq!(share_out(&[share(10, 50), share(10, 5)], 40), [35, 5]);
        assert_eq!(share_out(&[share(10, 50), share(30, 150)], 80), [20, 60]);
        assert_eq!(share_out(&[share(1, 5), share(1, 5), share(1, 5)], 4), [2, 1, 1]);
    }
}
