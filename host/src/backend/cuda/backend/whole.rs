//! Parking of requests whose pages all stay on the GPU: they leave it as a whole, and come back as a whole.

use spinkv_kernels::abi::{PageCopy, SLAB_PAGES};

use super::stages::gather_listed;
use super::{CudaBackend, Request};
use crate::memory::RequestPlan;
use crate::pipeline::RequestId;
use crate::{Error, Result};

/// Where the tokens of a row are.
struct Held {
    /// Pages that the host has, since they are complete.
    complete: Vec<PageCopy>,
    /// The physical page that has room left, if there is one.
    newest: Option<u32>,
}

impl CudaBackend {
    /// Keeps what the host has not of a request without a cache, each row's newest page, and gives all its pages to others. Waits for all that is under way.
    ///
    /// # Errors
    /// [`Error::ParkingUnsupported`] where the host's pages are not those of the GPU, or a refused copy; nothing is then changed.
    pub(super) fn park_whole(&mut self, id: RequestId) -> Result<()> {
        let sizes = self.sizes;
        if sizes.clusters.is_some() || sizes.code.is_some() || sizes.rank > 0 {
            return Err(Error::ParkingUnsupported);
        }
        self.settle()?;
        self.prompt.synchronize()?;
        let mut newest = Vec::new();
        for page in self.held(&self.requests[&id])?.into_iter().filter_map(|held| held.newest) {
            let first = newest.len();
            newest.resize(first + sizes.page_words, 0);
            self.tables.pool.read(&self.stream, page as usize * sizes.page_words, &mut newest[first..])?;
        }
        let request = self.requests.get_mut(&id).expect("looked up above");
        (request.newest, request.parked) = (newest, true);
        self.free_pages.append(&mut request.pages);
        self.admission.park(&self.config, id, true);
        // It is parked; who finds out about a device that failed is who goes on.
        let _ = self.share_out();
        Ok(())
    }

    /// Gives a request without a cache pages again, which the others have made room for, and fetches what they held.
    pub(super) fn fetch_whole(&mut self, id: RequestId) -> Result<()> {
        self.settle()?;
        self.prompt.synchronize()?;
        let mut request = self.requests.remove(&id).ok_or(Error::UnknownRequest(id))?;
        let count = self.pages_to_resume(true, &request.plan);
        request.pages = self.free_pages.split_off(self.free_pages.len() - count);
        let fetched = self.fetch_pages(&request);
        if fetched.is_ok() {
            request.newest = Vec::new();
        } else {
            self.free_pages.append(&mut request.pages);
        }
        self.requests.insert(id, request);
        fetched
    }

    fn fetch_pages(&self, request: &Request) -> Result<()> {
        let (sizes, stream, pool) = (self.sizes, &self.stream, &self.tables.pool);
        self.write_steady(request, &request.pages)?;
        let held = self.held(request)?;
        let newest = held.iter().filter_map(|held| held.newest);
        for (page, words) in newest.zip(request.newest.chunks_exact(sizes.page_words)) {
            pool.write(stream, page as usize * sizes.page_words, words)?;
        }
        // Between two steps nobody uses their lists.
        let (list, counts) = (&self.lists.copies, self.lists.counts[0].copies.part(0..1)?);
        let copies: Vec<_> = held.into_iter().flat_map(|held| held.complete).collect();
        for copies in copies.chunks(list.len()) {
            list.write(stream, 0, copies)?;
            counts.write(stream, 0, &[copies.len() as u32])?;
            let (list, host_pages) = (list.part(0..copies.len())?, self.arena.memory());
            let gather = gather_listed(&list, &counts, host_pages, pool, sizes.page_words);
            // SAFETY: the host has these pages of the request's slabs, and nothing writes them again while it has them; the device pages are its own, each is
            // named once, and who had them before was waited for when it gave them up.
            unsafe { gather.launch(&self.kernels, stream)? };
            // The next ones take the same list.
            stream.synchronize()?;
        }
        Ok(())
    }

    /// What each row of a request without a cache holds.
    fn held(&self, request: &Request) -> Result<Vec<Held>> {
        let (rows, stride, pages) = (self.sizes.rows(), self.sizes.slab_stride, SLAB_PAGES as usize);
        let mut valid = vec![0; rows * stride];
        self.tables.host_valid.read(&self.stream, request.place * rows * stride, &mut valid)?;
        // As its list of steady pages has them: nothing leaves.
        let (of_row, slabs_of_row) = (request.pages.len() / rows, request.slabs.len() / rows);
        let held = |row: usize| {
            let (steady, valid) =
                (&request.pages[row * of_row..][..of_row], &valid[row * stride..][..stride]);
            let slabs = &request.slabs[row * slabs_of_row..][..slabs_of_row];
            // Pages fill one after another. A last one that is never complete has no slab.
            let is_complete = |key: &usize| valid[key / pages] >> (key % pages) & 1 != 0;
            let complete = (0..of_row.min(slabs_of_row * pages)).take_while(is_complete).count();
            let copy = |key: usize| PageCopy {
                host_page: slabs[key / pages].number() * SLAB_PAGES + (key % pages) as u32,
                device_page: steady[key],
            };
            Held { complete: (0..complete).map(copy).collect(), newest: steady.get(complete).copied() }
        };
        Ok((0..rows).map(held).collect())
    }

    /// Pages that a parked request needs to go on.
    pub(super) fn pages_to_resume(&self, resident: bool, plan: &RequestPlan) -> usize {
        if resident {
            self.sizes.rows() * self.sizes.steady_pages(&self.config, plan, true)
        } else {
            plan.cache_pages()
        }
    }
}
