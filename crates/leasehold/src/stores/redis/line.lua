-- The line of waiters, for the scripts that need it; made only where there may be one. docs/protocol.md tells the rest.
-- The fence of a lock that has a line has a ! after its digits, and the lock's value has one after the claim id. A fence may
-- go on with ~ and a time in seconds: until then there may be tombstones. A plain fence says that there is neither.
local function line()
  local call, pcall, match, sub = redis.call, redis.pcall, string.match, string.sub
  local time = call('TIME')
  local now = time[1] * 1000000 + time[2]
  local function whole(number) return string.format('%.0f', number) end
  -- Nothing if the key holds something else.
  local function field(waiters, name)
    local text = pcall('HGET', waiters, name)
    return type(text) ~= 'table' and (text or '') or nil
  end
  local function strange_line(error)
    return sub(error.err, 1, 9) == 'WRONGTYPE' and redis.error_reply('BADQUEUE line') or error
  end
  local it = {}

  -- The queue (a sorted set of claims in the order of arrival), and what is known of the waiters (a hash).
  function it.keys(fence)
    local at = string.find(fence, '}:fence:', 1, true)
    local before, after = sub(fence, 1, at), sub(fence, at + 8)
    return before .. ':queue:' .. after, before .. ':waiters:' .. after
  end

  -- The last token, if known; the marks after it; and whether the key holds something else.
  function it.last(fence)
    local last = pcall('GET', fence)
    if not last then return nil, '', false end
    local digits, tail = match(type(last) == 'string' and last or '', '^(%d+)(!?~?%d*)$')
    return tonumber(digits), tail or '', not digits
  end

  -- The marks: ! if there is a line, and until when there may be tombstones.
  function it.tail(tail, has_line)
    local until_second = match(tail, '~(%d+)')
    if until_second and until_second * 1000000 <= now then until_second = nil end
    return (has_line and '!' or '') .. (until_second and '~' .. until_second or '')
  end

  local function tombstone(fence, claim)
    local at = string.find(fence, '}:fence:', 1, true)
    return sub(fence, 1, at) .. ':gone:' .. sub(fence, at + 8) .. ':' .. claim
  end

  -- Whether a claim was forbidden. Where the last token is not known, its marks are not known either.
  function it.is_gone(fence, claim, last, tail)
    if last and it.tail(tail, false) == '' then return false end
    return call('EXISTS', tombstone(fence, claim)) == 1
  end

  -- Forbids a claim for an hour, and says so on the fence. Answers an error, or nothing.
  function it.forbid(fence, claim)
    local set = pcall('SET', tombstone(fence, claim), '', 'PX', 3600000)
    if set.err then return set end
    local last, tail, strange = it.last(fence)
    if strange then return end
    local text = whole(last or 0) .. match(tail, '^!?') .. '~' .. whole(math.floor(now / 1000000) + 3601)
    if last then set = pcall('SET', fence, text, 'KEEPTTL') else set = pcall('SET', fence, text, 'PX', 90000000) end
    if set.err then return set end
  end

  -- Says on the fence and on the lock that there is a line.
  local function mark(lock, value, fence)
    if type(value) == 'string' and sub(value, 1, 4) == 'lh1:' and sub(value, 37, 37) == ':' then
      call('SETRANGE', lock, 36, '!')
    end
    local last, tail, strange = it.last(fence)
    if strange or sub(tail, 1, 1) == '!' then return end
    if last then
      call('SET', fence, whole(last) .. it.tail(tail, true), 'KEEPTTL')
    else
      call('SET', fence, '0!', 'PX', 90000000)
    end
  end

  -- A process was heard of, with this presentation as its latest. Side keys outlive no process by much. Answers an error,
  -- or nothing.
  local function hear(queue, waiters, process, window, attempt)
    local set = pcall('HSET', waiters, 'p' .. process, whole(now + window * 1000) .. ' ' .. attempt)
    if type(set) == 'table' then return strange_line(set) end
    local kept = math.max(60000, window * 4)
    call('PEXPIRE', queue, kept)
    call('PEXPIRE', waiters, kept)
  end

  -- Puts a claim in line, or finds it there. Answers how many are ahead, or an error.
  function it.enqueue(lock, value, fence, claim, wish, ttl, record)
    local tokens, process, window, attempt, limit = match(wish, '^(%d+) (%S+) (%d+) (%d+) (%S+)$')
    local queue, waiters = it.keys(fence)
    local rank = pcall('ZRANK', queue, claim)
    if type(rank) == 'table' then return strange_line(rank) end
    if not rank then
      rank = call('ZCARD', queue)
      if limit ~= '-' and rank >= tonumber(limit) then return redis.error_reply('QUEUEFULL ' .. rank) end
      local number = pcall('HINCRBY', waiters, 'n', 1)
      if type(number) == 'table' then return strange_line(number) end
      if tonumber(ttl) > 30000 then ttl = '30000' end
      call('HSET', waiters, 'c' .. claim, table.concat({'1', process, ttl, tokens, whole(now), record}, ' '))
      call('ZADD', queue, number, claim)
      mark(lock, value, fence)
    end
    return hear(queue, waiters, process, window, attempt) or rank
  end

  -- Hears of a process's waiters again, and hands a free lock on. Answers where each of the
  -- claims stands (-1 is not in line), or an error.
  function it.refresh(lock, fence, process, window, attempt, claims)
    local queue, waiters = it.keys(fence)
    local ranks = {}
    local there = call('EXISTS', queue) == 1
    if there then
      local error = hear(queue, waiters, process, window, attempt)
      if error then return error end
      local value = pcall('GET', lock)
      if value then
        mark(lock, value, fence)
      elseif not it.hand_over(lock, fence) then
        local _, _, strange = it.last(fence)
        if strange then return redis.error_reply('BADFENCE token') end
      end
    end
    for i, claim in ipairs(claims) do
      ranks[i] = there and pcall('ZRANK', queue, claim) or -1
      if type(ranks[i]) == 'table' then return strange_line(ranks[i]) end
    end
    return ranks
  end

  -- Takes a claim out of the line.
  function it.leave(fence, claim)
    local queue, waiters = it.keys(fence)
    local left = pcall('ZREM', queue, claim)
    if left ~= 1 then return end
    if type(pcall('HDEL', waiters, 'c' .. claim)) == 'table' then return end
    if call('EXISTS', queue) == 0 then call('DEL', waiters) end
  end

  -- Hands the lock, whose key is free or the caller's to overwrite, to the first in line who can be reached. The claim
  -- `asking`, if any, is being presented in this very call and needs no message. Answers the claim, or nothing: then
  -- the key is as it was, or an earlier waiter's.
  function it.hand_over(lock, fence, asking)
    local queue, waiters = it.keys(fence)
    local last, tail, strange = it.last(fence)
    if strange then return end
    local at, looked, deaf, silent = 0, 0, {}, 0
    while looked < 1000 and silent < 16 do
      looked = looked + 1
      local claim = pcall('ZRANGE', queue, at, at)[1]
      if not claim then break end
      local entry = field(waiters, 'c' .. claim)
      if not entry then return end
      local process, ttl, tokens, record = match(entry, '^1 (%S+) (%d+) (%d+) %d+ (.*)$')
      local heard, attempt = nil, '0'
      if process then heard, attempt = match(field(waiters, 'p' .. process), '^(%d+) (%d+)$') end
      if entry ~= '' and not process then
        -- Of a version that we do not know: left to those who do.
        at = at + 1
      elseif claim ~= asking and not (heard and tonumber(heard) > now) then
        call('ZREM', queue, claim)
        call('HDEL', waiters, 'c' .. claim)
      elseif claim ~= asking and deaf[process] then
        at = at + 1
      else
        local token = now
        if last and last >= now then token = last + 1 end
        last = token + tokens - 1
        if last > 9007199254740991 then return end
        local more = call('ZCARD', queue) > 1
        -- The fence first: if there is no memory for the lock, a number is lost and nothing else.
        local kept = whole(90000000 + (last - now) / 1000)
        local set = pcall('SET', fence, whole(last) .. it.tail(tail, more), 'PX', kept)
        if set.err then return end
        set = pcall('SET', lock, 'lh1:' .. claim .. (more and '!' or ':') .. whole(token) .. ':' .. record, 'PX', ttl)
        if set.err then return end
        local reached = claim == asking
        if not reached then
          local heard_by = pcall('PUBLISH', process, table.concat({'1', claim, whole(token), ttl, attempt, lock}, ' '))
          reached = type(heard_by) == 'number' and heard_by > 0
        end
        if reached then
          call('ZREM', queue, claim)
          if more then call('HDEL', waiters, 'c' .. claim) else call('DEL', waiters) end
          return claim
        end
        -- Nobody listens just now, but it may come back: it keeps its place, and the next one is tried.
        deaf[process], at, silent = true, at + 1, silent + 1
        call('DEL', lock)
      end
    end
    if call('EXISTS', queue) == 0 then call('DEL', waiters) end
  end

  return it
end
